"""Creates the bucket ``S3_BUCKET`` in the object store that the AWS variables name, unless it exists.

``python -m infra.bucket``; for a self-hosted store (``compose.yaml``). On AWS the bucket is created with its policy.
"""

import os
import sys

import boto3
from botocore.exceptions import BotoCoreError, ClientError


def main() -> int:
    """Ensures the bucket and logs it; returns the exit code."""
    name = os.environ.get("S3_BUCKET")
    if not name:
        print("error: S3_BUCKET: no bucket is named; set it to one, such as x-rays", file=sys.stderr)
        return 2
    try:
        print(f"bucket {name}: {ensure_bucket(name)}")
    except (BotoCoreError, ClientError, ValueError) as error:
        # Only the error's code: the text may hold keys.
        reason = error.response["Error"]["Code"] if isinstance(error, ClientError) else type(error).__name__
        print(f"error: S3_BUCKET: {name} cannot be made ({reason}); check the AWS variables", file=sys.stderr)
        return 2
    return 0


def ensure_bucket(name: str) -> str:
    """Creates a bucket; returns what it did."""
    store = boto3.client("s3")
    if name in {bucket["Name"] for bucket in store.list_buckets()["Buckets"]}:
        return "there already"
    store.create_bucket(Bucket=name)
    return "created"


if __name__ == "__main__":
    sys.exit(main())
