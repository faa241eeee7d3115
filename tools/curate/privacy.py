"""Pseudonyms: what tells a patient or a file apart leaves the headers only as a salted hash.

Names, dates, accession numbers and free texts are never kept at all. A hash of an identifier without a salt could be
undone by trying all identifiers; with one it can't, as long as the salt stays secret.
"""

import hashlib
import hmac
import os
import re
import secrets
from pathlib import Path

from custom.errors import BadInput

SALT = "salt"


class Pseudonyms:
    """Turn identifiers into hashes of 16 hexadecimal digits.

    Args:
        salt: the secret; the same salt gives the same hashes, in another run and for another set too.
    """

    def __init__(self, salt: str) -> None:
        self._salt = salt.encode()

    def __call__(self, kind: str, *values: object) -> str:
        text = "\0".join([kind, *map(str, values)]).encode("utf-8", "surrogateescape")
        return hmac.new(self._salt, text, hashlib.sha256).hexdigest()[:16]

    def patient(self, identifier: object) -> str:
        """Hash a patient's identifier so that its spellings, "PGBM-003" and "pgbm003", are one.

        Returns "" for one that tells nobody apart: empty, or what anonymisers write for everybody.
        """
        plain = re.sub(r"[\W_]+", "", str(identifier or "")).casefold()
        if not plain or re.fullmatch(
            r"0+|x+|(anon\w*?|unknown|none|na|null|patient|noid|removed|deidentified)0*", plain
        ):
            return ""
        return self("patient", plain)


def read_salt(out: Path, file: str | None) -> str:
    """Return the salt of a set, from a file that the user names or from the set's own, which is made if missing.

    Raises:
        BadInput: for a named file that can't be read, holds less than 16 characters, or is not the set's salt.
    """
    own = out / SALT
    try:
        given = Path(file).read_text(encoding="utf-8").strip() if file else None
        salt = own.read_text(encoding="utf-8").strip() if own.is_file() else None
    except (OSError, ValueError) as error:
        raise BadInput(f"The salt {file or own} can't be read: {error}.") from error
    if given is not None and len(given) < 16:
        raise BadInput(f"The salt {file} has {len(given)} characters; 16 are the least that can't be guessed.")
    if given and salt and given != salt:
        raise BadInput(f"{out} was begun with another salt than {file}; take that one, or another folder.")
    if not salt:
        salt = given or secrets.token_hex(16)
        with open(os.open(own, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as stream:
            stream.write(salt + "\n")
    return salt
