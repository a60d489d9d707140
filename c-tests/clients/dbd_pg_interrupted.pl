# Perl's DBD::Pg: a query that waits for its end, cancelled from the handler of SIGINT, as DBI's manual says: by
# POSIX::sigaction, because what is in %SIG would not run before the query's end.
use strict;
use warnings;
use DBI;
use POSIX ":signal_h";

my $session = DBI->connect("dbi:Pg:$ARGV[0]", undef, undef, { RaiseError => 1, PrintError => 0 });
my $query = $session->prepare("select pg_sleep(600)");
sigaction(SIGINT, POSIX::SigAction->new(sub { $query->cancel }));
eval { $query->execute };
print "query: ", $query->state, "\n";
print "answer: ", $session->selectrow_array("select 6 * 7"), "\n";
