"""Fencing an object of an S3 store, tried: python object_store.py [http://127.0.0.1:9000]

Without the address of a store it starts one that keeps nothing. Writes to a bucket of its own, which it removes in the end.
The credentials are those of the environment, as always with boto3.
"""

import json
import os
import sys
import uuid

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

# A condition that does not hold, another write under way, an object that has just gone. Source: Amazon S3 User Guide, "How to
# prevent object overwrites with conditional writes".
BEATEN = ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey")


def look(s3, bucket, name):
    """The token of the object as it is now, and the condition that it still is that object."""
    try:
        seen = s3.head_object(Bucket=bucket, Key=name)
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
            raise
        return 0, {"IfNoneMatch": "*"}
    return int(seen["Metadata"].get("token", 0)), {"IfMatch": seen["ETag"]}


def put(s3, bucket, name, report, token, condition):
    # The token is in the content too: S3 computes the ETag from the content alone, and two holders may write the same.
    body = json.dumps({"token": token, "report": report}).encode()
    s3.put_object(Bucket=bucket, Key=name, Body=body, Metadata={"token": str(token)}, **condition)


def write(s3, bucket, name, report, token):
    """True when it is written, False when a later holder has been here."""
    while True:
        seen, condition = look(s3, bucket, name)
        if seen > token:
            return False
        try:
            put(s3, bucket, name, report, token, condition)
            return True
        except ClientError as error:
            if error.response["Error"]["Code"] not in BEATEN:
                raise
            # Somebody wrote after the look: look again.


def is_refused(s3, bucket, name, report, token, condition):
    """Whether the store itself refuses to write under this condition."""
    try:
        put(s3, bucket, name, report, token, condition)
    except ClientError as error:
        assert error.response["Error"]["Code"] == "PreconditionFailed", error
        return True
    return False


def report(s3, bucket, name):
    return json.load(s3.get_object(Bucket=bucket, Key=name)["Body"])["report"]


def try_all(s3, bucket):
    _, first = look(s3, bucket, "daily")  # one holder has looked and is paused before it writes
    assert write(s3, bucket, "daily", "fine", token=41), "the first write"
    assert is_refused(s3, bucket, "daily", "stale", 40, first), "the store refuses another first write"

    assert write(s3, bucket, "daily", "fine", token=41), "the same holder again"
    seen, paused = look(s3, bucket, "daily")  # and looks once more, and is paused before it writes
    assert seen == 41
    assert write(s3, bucket, "daily", "fine", token=42), "the next holder, who happens to write the same"
    assert not write(s3, bucket, "daily", "stale", token=41), "the stale write is refused, by the look"
    assert is_refused(s3, bucket, "daily", "stale", 41, paused), "and by the store after an earlier look"
    assert report(s3, bucket, "daily") == "fine"

    assert not is_refused(s3, bucket, "daily", "stale", 41, {})
    assert report(s3, bucket, "daily") == "stale", "without the condition it gets through"

    s3.put_object(Bucket=bucket, Key="old", Body=b"{}")
    assert write(s3, bucket, "old", "fine", token=41), "an object that was never fenced"

    print("Object store: the stale write is refused, and without the condition it gets through")


def main(address):
    s3 = boto3.client("s3", endpoint_url=address, config=Config(connect_timeout=10, read_timeout=10))
    bucket = f"fencing-{uuid.uuid4().hex}"
    s3.create_bucket(Bucket=bucket)
    try:
        try_all(s3, bucket)
    finally:
        for kept in s3.list_objects_v2(Bucket=bucket).get("Contents", []):
            s3.delete_object(Bucket=bucket, Key=kept["Key"])
        s3.delete_bucket(Bucket=bucket)


def main_with_a_store_of_its_own():
    from moto.server import ThreadedMotoServer

    os.environ.update(AWS_ACCESS_KEY_ID="any", AWS_SECRET_ACCESS_KEY="any", AWS_DEFAULT_REGION="us-east-1")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()  # a thread of this process
    try:
        host, port = server.get_host_and_port()
        main(f"http://{host}:{port}")
    finally:
        server.stop()


if __name__ == "__main__":
    main(sys.argv[1]) if len(sys.argv) > 1 else main_with_a_store_of_its_own()
