"""infra/terraform. Its provider is in no package index, so `terraform validate` is not run: the files are parsed, and held to rules."""

import re
import subprocess

import hcl2
import pytest

from tests.infra.files import INFRA, program

FOLDER = INFRA / "terraform"


def plain(found):
    """Without the parser's quotes and marks."""
    if isinstance(found, dict):
        return {plain(name): plain(value) for name, value in found.items() if name != "__is_block__"}
    if isinstance(found, list):
        return [plain(value) for value in found]
    return found.strip('"') if isinstance(found, str) else found


def blocks(kind: str) -> dict[str, dict]:
    """Every resource or data block of all files, by "type.name"."""
    found = {}
    for path in sorted(FOLDER.glob("*.tf")):
        for block in plain(hcl2.loads(path.read_text())).get(kind, []):
            found |= {f"{of}.{name}": body for of, named in block.items() for name, body in named.items()}
    return found


def variables() -> set[str]:
    return {name for block in plain(hcl2.loads((FOLDER / "variables.tf").read_text()))["variable"] for name in block}


@pytest.fixture(scope="module")
def resources() -> dict[str, dict]:
    return blocks("resource")


@pytest.fixture(scope="module")
def policies() -> dict[str, list[dict]]:
    """Statements of each policy document."""
    return {name.split(".")[1]: body["statement"] for name, body in blocks("data").items() if name.startswith("aws_iam_policy_document.")}


def test_format():
    if not (terraform := program("terraform")):
        pytest.skip("terraform is not installed")
    assert subprocess.run([terraform, "fmt", "-check", "-recursive", FOLDER], capture_output=True, check=False).returncode == 0


def test_every_reference_is_there(resources):
    names = {*resources, *(f"data.{name}" for name in blocks("data")), *(f"var.{name}" for name in variables())}
    text = "".join(path.read_text() for path in FOLDER.glob("*.tf"))
    used = set(re.findall(r"(?<![\w.:/\"-])((?:data\.)?aws_\w+\.\w+|var\.\w+)", text))
    assert used and used <= names, used - names


def test_buckets(resources):
    every = "${aws_s3_bucket.data}"
    about = {
        name: body for name, body in resources.items() if name.startswith("aws_s3_bucket_") and name != "aws_s3_bucket_notification.raw"
    }
    assert all(body["for_each"] == every for body in about.values())
    block = about["aws_s3_bucket_public_access_block.data"]
    assert [block[k] for k in ("block_public_acls", "block_public_policy", "ignore_public_acls", "restrict_public_buckets")] == [True] * 4
    assert about["aws_s3_bucket_versioning.data"]["versioning_configuration"] == [{"status": "Enabled"}]
    assert about["aws_s3_bucket_ownership_controls.data"]["rule"] == [{"object_ownership": "BucketOwnerEnforced"}]
    (rule,) = about["aws_s3_bucket_server_side_encryption_configuration.data"]["rule"]
    (default,) = rule["apply_server_side_encryption_by_default"]
    assert default == {"sse_algorithm": "aws:kms", "kms_master_key_id": "${aws_kms_key.data.arn}"} and rule["bucket_key_enabled"]
    (rule,) = about["aws_s3_bucket_lifecycle_configuration.data"]["rule"]
    assert rule["status"] == "Enabled" and rule["abort_incomplete_multipart_upload"][0]["days_after_initiation"] <= 7
    assert resources["aws_kms_key.data"]["enable_key_rotation"] is True


def test_only_tls(policies):
    statement = next(s for s in policies["bucket"] if s["sid"] == "OnlyTLS")
    assert statement["effect"] == "Deny" and statement["actions"] == ["s3:*"] and len(statement["resources"]) == 2
    assert statement["condition"] == [{"test": "Bool", "variable": "aws:SecureTransport", "values": ["false"]}]


def test_no_object_is_under_another_key(policies):
    """What a write may say of encryption: nothing, or the bucket's key."""
    asked = {s["sid"]: {(c["test"], c["variable"].rsplit("-", 1)[1]): c["values"] for c in s["condition"]} for s in policies["bucket"][1:]}
    assert asked == {
        "NoOtherKey": {("StringNotEquals", "id"): ["${aws_kms_key.data.arn}"], ("Null", "id"): ["false"]},
        "NoEncryptionWithoutTheKey": {("Null", "encryption"): ["false"], ("Null", "id"): ["true"]},
    }
    assert all(s["effect"] == "Deny" for s in policies["bucket"])


def test_rights_are_named_one_by_one(policies):
    for name in ("reads_raw", "writes_enriched", "trust", "queue"):
        for statement in policies[name]:
            assert not any("*" in action for action in statement["actions"]), name
            assert "*" not in statement.get("resources", []) and "NotAction" not in statement, name
    raw = {action for s in policies["reads_raw"] for action in s["actions"]}
    assert raw == {"s3:ListBucket", "s3:GetObject", "kms:Decrypt"}
    assert all("local.raw" in r or "aws_kms_key" in r for s in policies["reads_raw"] for r in s["resources"])
    assert all("local.enriched" in r or "aws_kms_key" in r for s in policies["writes_enriched"] for r in s["resources"])
    allowed = [s for statements in policies.values() for s in statements if s.get("effect") != "Deny"]
    assert not [s for s in allowed for p in s.get("principals", []) if "*" in p["identifiers"]]
    wide = [s["sid"] for s in allowed if any("*" in action for action in s["actions"])]
    assert wide == ["TheAccountAdministers"]  # the key's own policy


def test_the_role_is_the_service_accounts(policies):
    (statement,) = policies["trust"]
    assert {c["variable"].split("}")[-1]: c["values"] for c in statement["condition"]} == {
        ":sub": "${var.service_accounts}",
        ":aud": ["sts.amazonaws.com"],
    }


def test_notifications(resources, policies):
    assert resources["aws_s3_bucket_notification.raw"]["eventbridge"] is True
    queues = {name: body for name, body in resources.items() if name.startswith("aws_sqs_queue.")}
    assert len(queues) == 2 and all(body["kms_master_key_id"] == "${aws_kms_key.data.arn}" for body in queues.values())
    (statement,) = policies["queue"]
    assert statement["condition"][0]["variable"] == "aws:SourceArn"
