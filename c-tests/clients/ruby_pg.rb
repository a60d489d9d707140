# ruby-pg, by the method that is named: `cancel` reads the key out of libpq's PGcancel and sends it over a socket of
# Ruby's; `sync_cancel` calls PQcancel.
require "pg"

way, conninfo = ARGV
session = PG.connect(conninfo)
session.send_query("select pg_sleep(600)")
$stdin.gets
puts "cancel: #{session.public_send(way).inspect}"
begin
  session.get_last_result
rescue PG::Error => error
  puts "query: #{error.result.error_field(PG::PG_DIAG_SQLSTATE)}"
end
puts "answer: #{session.exec("select 6 * 7").getvalue(0, 0)}"
