"""Fencing a write to MongoDB, tried: python mongodb.py mongodb://127.0.0.1:27017/

Writes to a database of its own, which it drops in the end.
"""

import sys
import uuid
from concurrent.futures import ThreadPoolExecutor

from pymongo import MongoClient, WriteConcern
from pymongo.errors import DuplicateKeyError


def write(accounts, account, balance, token):
    """True when it is written, False when a later holder has been here."""
    for _ in range(2):
        try:
            accounts.update_one(
                {"_id": account, "token": {"$not": {"$gt": token}}},
                {"$set": {"balance": balance, "token": token}},
                upsert=True,
            )
            return True
        except DuplicateKeyError:
            pass  # the document exists and did not match: a later holder wrote it, or it was created just now
    return False


def write_unfenced(accounts, account, balance, token):
    """The same without the condition."""
    accounts.update_one({"_id": account}, {"$set": {"balance": balance, "token": token}}, upsert=True)


def main(uri):
    with MongoClient(uri, serverSelectionTimeoutMS=10_000) as client:
        name = f"leased-test-fencing-{uuid.uuid4().hex}"
        # Acknowledged by a majority: else a failover may undo a write, and the token that came with it.
        accounts = client[name].get_collection("accounts", write_concern=WriteConcern("majority"))
        try:
            try_all(accounts)
        finally:
            client.drop_database(name)


def try_all(accounts):
    assert write(accounts, "alice", 100, token=41), "the first write"
    assert write(accounts, "alice", 110, token=41), "the same holder again"
    assert write(accounts, "alice", 120, token=42), "the next holder"
    assert not write(accounts, "alice", 7, token=41), "the stale write is refused"
    assert accounts.find_one({"_id": "alice"})["balance"] == 120

    write_unfenced(accounts, "alice", 7, token=41)
    assert accounts.find_one({"_id": "alice"})["balance"] == 7, "without the condition it gets through"

    accounts.insert_one({"_id": "bob", "balance": 1})
    assert write(accounts, "bob", 2, token=41), "a document that was never fenced"

    # The first write of a document, by several at once: whoever comes in between, the latest holder is not refused.
    with ThreadPoolExecutor(8) as threads:
        for race in range(20):
            tokens = range(1, 9)
            written = list(threads.map(lambda token: write(accounts, race, token, token), tokens))
            assert written[-1] and accounts.find_one({"_id": race})["balance"] == 8, written

    print("MongoDB: the stale write is refused, and without the condition it gets through")


if __name__ == "__main__":
    main(sys.argv[1])
