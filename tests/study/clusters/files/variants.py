"""Files for `ray up` of every kind that `study.cluster` writes."""

from __future__ import annotations

from study import cluster

DATABASE = "postgresql+psycopg://me@database.example/paretovl"
VARIANTS = {
    "aws": [],
    "aws-one-type": ["--machines", "g6.4xlarge", "--zones", "us-west-2b", "--idle-minutes", "10"],
    "aws-eight-gpus": ["--machines", "g6.48xlarge", "--nodes", "2", "--preset", "coco_clip_b16_8gpu"],
    "aws-bucket": ["--bucket", "my-bucket", "--storage", DATABASE, "--region", "eu-west-1"],
    "gcp": [],
    "gcp-bucket": ["--bucket", "my-bucket", "--storage", DATABASE],
    "local": [],
    "local-named": [
        "--head",
        "10.0.0.1",
        "--workers",
        "10.0.0.2,10.0.0.3",
        "--user",
        "root",
        "--shared",
        "/srv/studies",
    ],
}


def rendered(name: str) -> str:
    return cluster.text(cluster.parse(["--provider", name.partition("-")[0], *VARIANTS[name]]))
