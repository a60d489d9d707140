<?php
/*
 * PHP's extension pgsql. pg_cancel_query() takes the query's results away itself, so that its SQLSTATE is not to be had.
 * (PDO has nothing that cancels.)
 */
$session = pg_connect($argv[1]);
pg_send_query($session, "select pg_sleep(600)");
fgets(STDIN);
echo "cancel: ", var_export(pg_cancel_query($session), true), "\n";
echo "answer: ", pg_fetch_result(pg_query($session, "select 6 * 7"), 0), "\n";
