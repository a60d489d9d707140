# Perl's DBD::Pg: an asynchronous query, cancelled by the session.
use strict;
use warnings;
use DBI;
use DBD::Pg ":async";

my $session = DBI->connect("dbi:Pg:$ARGV[0]", undef, undef, { RaiseError => 1, PrintError => 0 });
$session->do("select pg_sleep(600)", { pg_async => PG_ASYNC });
<STDIN>;
print "cancel: ", $session->pg_cancel, "\n";
print "query: ", $session->state, "\n";
print "answer: ", $session->selectrow_array("select 6 * 7"), "\n";
