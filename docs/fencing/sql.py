"""Fencing a row of an SQL database, tried with SQLite: python sql.py"""

import sqlite3

UPDATE = "UPDATE account SET balance = :balance, token = :token WHERE id = :id AND token <= :token"
INSERT = "INSERT INTO account (id, balance, token) VALUES (:id, :balance, :token)"


def write(database, account, balance, token):
    """True when it is written, False when a later holder has been here."""
    values = {"id": account, "balance": balance, "token": token}
    # The second UPDATE follows a refused INSERT: an earlier holder may have created the row in between.
    for statement in (UPDATE, INSERT, UPDATE):
        try:
            if database.execute(statement, values).rowcount == 1:
                return True
        except sqlite3.IntegrityError:
            pass  # there is a row
    return False


def write_unfenced(database, account, balance, token):
    """The same without the condition."""
    update = UPDATE.removesuffix(" AND token <= :token")
    assert update != UPDATE
    database.execute(update, {"id": account, "balance": balance, "token": token})


def balance(database, account):
    return database.execute("SELECT balance FROM account WHERE id = ?", (account,)).fetchone()[0]


def main():
    # Each statement is a transaction of its own.
    database = sqlite3.connect(":memory:", isolation_level=None)
    database.execute("CREATE TABLE account (id VARCHAR(100) PRIMARY KEY, balance BIGINT NOT NULL)")
    database.execute("INSERT INTO account (id, balance) VALUES ('bob', 1)")
    database.execute("ALTER TABLE account ADD COLUMN token BIGINT NOT NULL DEFAULT 0")

    assert write(database, "alice", 100, token=41), "the first write"
    assert write(database, "alice", 110, token=41), "the same holder again"
    assert write(database, "alice", 120, token=42), "the next holder"
    assert not write(database, "alice", 7, token=41), "the stale write is refused"
    assert balance(database, "alice") == 120

    write_unfenced(database, "alice", 7, token=41)
    assert balance(database, "alice") == 7, "without the condition it gets through"

    assert write(database, "bob", 2, token=41), "a row that was there before the tokens"

    print("SQL: the stale write is refused, and without the condition it gets through")


if __name__ == "__main__":
    main()
