"""What looks like a secret, by its name or by what it holds."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import PurePath

# Of a file, or of a folder above it; in lower case.
NAMES = (
    *(".env*", "*.env", ".netrc", "_netrc", ".ssh", ".aws", ".azure", ".gcloud", ".kube", ".docker", ".gnupg"),
    *(".git-credentials", ".pypirc", ".npmrc", ".huggingface", ".modal.toml", ".pgpass", ".htpasswd", ".boto"),
    *("*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.ppk", "*.gpg", "*.asc", "*.kdbx"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "*kubeconfig*", "kube.config", "*service*account*"),
    *("*secret*", "*credential*", "*passwd*", "*password*", "*api_key*", "*apikey*", "*api-key*"),
)
NAMES_BUT_OF_CODE = ("id_*", "*token*")  # id_rules.py and token_counts.py are code; what they hold is looked at
_CONTENT = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|\bhf_[A-Za-z0-9]{30,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}|\bglpat-[\w-]{20,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bsk-[\w-]{32,}|\bxox[abprs]-[\w-]{20,}|\bAIza[\w-]{35}|\bpypi-[\w-]{40,}"
    r"|\bwandb_v\d_\w{30,}"
    r"""|(?i:["']?\b\w*(?:api_?key|secret|password|access_?token|auth_?token)["']?\s*[:=]\s*["']?[0-9a-f]{32,}\b)"""
)


def secret_name(path: PurePath) -> str:
    """The part of a relative path that is named like a secret, "" if none is."""
    for part in path.parts:
        name = part.lower()
        if any(fnmatchcase(name, pattern) for pattern in NAMES):
            return part
        plain = name.replace("tokeniz", "")  # tokenizer.json is part of a model
        if not name.endswith(".py") and any(fnmatchcase(plain, pattern) for pattern in NAMES_BUT_OF_CODE):
            return part
    return ""


def secret_line(text: str) -> int:
    """Number of the first line that holds what looks like a key or a password, 0 if none does."""
    found = _CONTENT.search(text)
    return 0 if found is None else text.count("\n", 0, found.start()) + 1


def secret_variable(name: str) -> bool:
    """Whether an environment variable is named like a secret: HF_TOKEN, WANDB_API_KEY."""
    return re.search(r"(?i)token|key|secret|password|credential", name) is not None
