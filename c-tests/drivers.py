"""A Python program that cancels its queries, each when told to by a line of input. test_drivers.py starts it in a terminal.

    drivers.py WAY CONNINFO QUERIES
"""

from __future__ import annotations

import asyncio
import functools
import os
import sys
import threading
from contextlib import contextmanager

QUERY = "select pg_sleep(600)"
ANSWER = "select 6 * 7"
SAFE_TIMEOUT = float(os.environ.get("PQCANCEL_TIMEOUT", "60"))  # seconds


def psycopg2_cancel(conninfo: str, queries: int) -> None:
    """The connection takes one PGcancel when it is made, and keeps it."""
    import psycopg2

    print("psycopg2", psycopg2.__version__.split()[0], "on libpq", psycopg2.__libpq_version__)
    session = psycopg2.connect(conninfo)
    cursor = session.cursor()
    cancel_in_thread(lambda: cursor.execute(QUERY), session.cancel, session.rollback, queries)
    cursor.execute(ANSWER)
    print("answer", cursor.fetchone()[0])


def psycopg_cancel(conninfo: str, queries: int) -> None:
    session = psycopg().Connection.connect(conninfo)
    cancel_in_thread(lambda: session.execute(QUERY), session.cancel, session.rollback, queries)
    print("answer", session.execute(ANSWER).fetchone()[0])


def psycopg_cancel_safe(conninfo: str, queries: int) -> None:
    session = psycopg().Connection.connect(conninfo)
    cancel = functools.partial(session.cancel_safe, timeout=SAFE_TIMEOUT)
    cancel_in_thread(lambda: session.execute(QUERY), cancel, session.rollback, queries)
    print("answer", session.execute(ANSWER).fetchone()[0])


def psycopg_async_cancel(conninfo: str, queries: int) -> None:
    async def cancel(session) -> None:
        session.cancel()

    asyncio.run(cancel_in_task(conninfo, cancel, queries))


def psycopg_async_cancel_safe(conninfo: str, queries: int) -> None:
    asyncio.run(cancel_in_task(conninfo, lambda session: session.cancel_safe(timeout=SAFE_TIMEOUT), queries))


def psycopg():
    import psycopg

    print("psycopg", psycopg.__version__, psycopg.pq.__impl__, "on libpq", psycopg.pq.version())
    return psycopg


def cancel_in_thread(execute, cancel, rollback, queries: int) -> None:
    def when_told() -> None:
        sys.stdin.readline()
        with shown("cancel"):
            cancel()

    for _ in range(queries):
        thread = threading.Thread(target=when_told)
        thread.start()
        with shown("query"):
            try:
                execute()
            finally:
                thread.join()
        rollback()


async def cancel_in_task(conninfo: str, cancel, queries: int) -> None:
    session = await psycopg().AsyncConnection.connect(conninfo)
    for _ in range(queries):
        query = asyncio.create_task(session.execute(QUERY))
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        with shown("cancel"):
            await cancel(session)
        with shown("query"):
            await query
        await session.rollback()
    print("answer", (await (await session.execute(ANSWER)).fetchone())[0])


@contextmanager
def shown(what: str):
    """Prints how it ended."""
    try:
        yield
        print(what, "returned")
    except Exception as error:
        print(what, "raised", type(error).__name__, str(error).splitlines()[0])


WAYS = {way.__name__: way for way in (psycopg2_cancel, psycopg_cancel, psycopg_cancel_safe, psycopg_async_cancel,
                                      psycopg_async_cancel_safe)}

if __name__ == "__main__":
    name, conninfo, queries = sys.argv[1:]
    WAYS[name](conninfo, int(queries))
