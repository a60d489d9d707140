"""PyGreSQL: cancel() from another thread."""

import sys
import threading

import pg


def cancel_when_told() -> None:
    sys.stdin.readline()
    session.cancel()


session = pg.connect(sys.argv[1])
thread = threading.Thread(target=cancel_when_told)
thread.start()
try:
    session.query("select pg_sleep(600)")
except pg.DatabaseError as error:
    print("query:", error.sqlstate)
thread.join()
print("answer:", session.query("select 6 * 7").getresult()[0][0])
