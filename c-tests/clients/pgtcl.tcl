# Pgtcl: pg_cancelrequest, which calls PQrequestCancel.
package require Pgtcl

set session [pg_connect -conninfo [lindex $argv 0]]
pg_sendquery $session "select pg_sleep(600)"
gets stdin
pg_cancelrequest $session
puts "query: [pg_result [pg_getresult $session] -error sqlstate]"
pg_getresult $session
puts "answer: [pg_result [pg_exec $session "select 6 * 7"] -list]"
