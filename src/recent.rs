//! A few things remembered, the oldest forgotten first. It has a fixed place and allocates nothing.

/// Up to N of them.
pub(crate) struct Recent<T, const N: usize> {
    entries: [Option<T>; N],
    next: usize,
}

impl<T, const N: usize> Recent<T, N> {
    pub(crate) const fn new() -> Self {
        Recent { entries: [const { None }; N], next: 0 }
    }

    /// The one that is meant.
    pub(crate) fn find(&self, is_meant: impl Fn(&T) -> bool) -> Option<&T> {
        self.entries.iter().flatten().find(|entry| is_meant(entry))
    }

    /// Takes these out.
    pub(crate) fn take(&mut self, is_meant: impl Fn(&T) -> bool) -> [Option<T>; N] {
        self.entries.each_mut().map(|entry| entry.take_if(|entry| is_meant(entry)))
    }

    /// One more. What it takes the place of is returned.
    pub(crate) fn remember(&mut self, entry: T) -> Option<T> {
        let free = self.entries.iter().position(Option::is_none).unwrap_or(self.next);
        self.next = (free + 1) % N;
        self.entries.get_mut(free)?.replace(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_is_forgotten_first() {
        let mut recent = Recent::<u32, 3>::new();
        assert_eq!([1, 2, 3].map(|n| recent.remember(n)), [None; 3]);
        assert_eq!([4, 5].map(|n| recent.remember(n)), [Some(1), Some(2)]);
        assert_eq!(recent.find(|n| *n > 3), Some(&4));
        assert_eq!(recent.find(|n| *n == 2), None);
        assert_eq!(recent.take(|n| *n == 3), [None, None, Some(3)]);
        assert_eq!([6, 7].map(|n| recent.remember(n)), [None, Some(4)]);
    }
}
