//! JSON (RFC 8259), as far as it has to be written.

use std::fmt::{self, Display, Formatter};

pub(crate) enum Value {
    Null,
    Bool(bool),
    Number(f64),
    Text(String),
    List(Vec<Value>),
    Object(Vec<(&'static str, Value)>),
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Value::Bool(value)
    }
}

impl From<f64> for Value {
    fn from(value: f64) -> Self {
        Value::Number(value)
    }
}

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Value::Text(value.to_owned())
    }
}

impl From<String> for Value {
    fn from(value: String) -> Self {
        Value::Text(value)
    }
}

impl<T: Into<Value>> From<Option<T>> for Value {
    fn from(value: Option<T>) -> Self {
        value.map_or(Value::Null, Into::into)
    }
}

impl Display for Value {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.write(f, 0)
    }
}

impl Value {
    fn write(&self, f: &mut Formatter<'_>, depth: usize) -> fmt::Result {
        match self {
            Value::Null => f.write_str("null"),
            Value::Bool(value) => write!(f, "{value}"),
            Value::Number(value) if value.is_finite() => write!(f, "{value}"),
            Value::Number(_) => f.write_str("null"),
            Value::Text(text) => write_text(f, text),
            Value::List(values) => {
                write_all(f, ('[', ']'), values, depth, |f, value| value.write(f, depth + 1))
            }
            Value::Object(members) => {
                write_all(f, ('{', '}'), members, depth, |f, (name, value)| {
                    write_text(f, name)?;
                    f.write_str(": ")?;
                    value.write(f, depth + 1)
                })
            }
        }
    }
}

/// One a line, indented.
fn write_all<T>(
    f: &mut Formatter<'_>,
    (opening, closing): (char, char),
    all: &[T],
    depth: usize,
    write: impl Fn(&mut Formatter<'_>, &T) -> fmt::Result,
) -> fmt::Result {
    write!(f, "{opening}")?;
    for (number, one) in all.iter().enumerate() {
        let separator = if number == 0 { "" } else { "," };
        write!(f, "{separator}\n{:1$}", "", 2 * depth + 2)?;
        write(f, one)?;
    }
    if !all.is_empty() {
        write!(f, "\n{:1$}", "", 2 * depth)?;
    }
    write!(f, "{closing}")
}

fn write_text(f: &mut Formatter<'_>, text: &str) -> fmt::Result {
    f.write_str("\"")?;
    for character in text.chars() {
        match character {
            '"' => f.write_str("\\\"")?,
            '\\' => f.write_str("\\\\")?,
            '\n' => f.write_str("\\n")?,
            '\t' => f.write_str("\\t")?,
            control if control < ' ' => write!(f, "\\u{:04x}", u32::from(control))?,
            other => write!(f, "{other}")?,
        }
    }
    f.write_str("\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_kinds_of_values() {
        let value = Value::Object(vec![
            ("nothing", None::<bool>.into()),
            ("empty", Value::List(vec![])),
            ("list", Value::List(vec![true.into(), 1.5.into(), f64::NAN.into(), 2.0.into()])),
            ("text", "a \"b\" \\ \n\t\u{1}\u{7f}é".into()),
        ]);
        let expected = [
            "{",
            r#"  "nothing": null,"#,
            r#"  "empty": [],"#,
            r#"  "list": ["#,
            "    true,",
            "    1.5,",
            "    null,",
            "    2",
            "  ],",
            "  \"text\": \"a \\\"b\\\" \\\\ \\n\\t\\u0001\u{7f}é\"",
            "}",
        ];
        assert_eq!(value.to_string(), expected.join("\n"));
    }
}
