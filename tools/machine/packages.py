"""Debian's packages, unpacked into folders.

Nothing is installed, and the machine's own sources and package lists stay as they are: each suite has lists of its own
in the cache, fetched with the machine's apt, from the machine's own Debian mirror.
"""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from .failure import Failed

KEYRINGS = [Path(f"/usr/share/keyrings/debian-archive-keyring.{ending}") for ending in ("gpg", "pgp")]


def say(text: str) -> None:
    """A line on what is going on, where it does not mix with the guest's console."""
    os.write(2, f"    {text}\n".encode())


def output_of(command: list, why: str) -> str:
    """What a command prints; a command that fails is the end."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    except FileNotFoundError:
        raise Failed(f"{command[0]} is missing; run tools/setup vm") from None
    if done.returncode:
        raise Failed(f"{why}: {(done.stderr or done.stdout).strip() or f'{command[0]} failed'}")
    return done.stdout


def mirror() -> str:
    """Where this machine gets Debian from."""
    query = ["apt-get", "indextargets", "--format", "$(ORIGIN)|$(REPO_URI)|$(RELEASE)", "Identifier: Packages"]
    for line in output_of(query, "apt does not tell its sources").splitlines():
        origin, uri, release = line.split("|")
        # Not the security archive, which has other suites.
        if origin == "Debian" and re.fullmatch(r"[a-z]+", release):
            return uri
    raise Failed("apt on this machine has no lists of Debian's packages; run apt-get update")


class Suite:
    """One of Debian's suites, such as `bookworm` or `bookworm-backports`."""

    def __init__(self, name: str, cache: Path):
        self.name = name
        self.state = cache / "apt" / name

    def _apt(self, tool: str, *words: str) -> list[str]:
        settings = {
            "Dir::State": self.state,
            "Dir::State::status": self.state / "status",
            "Dir::Cache": self.state / "cache",
            "Dir::Etc::SourceList": self.state / "sources.list",
            "Dir::Etc::SourceParts": "/dev/null",
            "Dir::Etc::Preferences": "/dev/null",
            "Dir::Etc::PreferencesParts": "/dev/null",
            "Acquire::Languages": "none",
            # The cache may lie where apt's own user cannot go.
            "APT::Sandbox::User": "root",
        }
        return [tool, "-q", *(f"-o={key}={value}" for key, value in settings.items()), *words]

    def update(self) -> None:
        """Fetches the suite's list of packages."""
        keyring = next((path for path in KEYRINGS if path.exists()), None)
        if not keyring:
            raise Failed("there are no Debian archive keys in /usr/share/keyrings; install debian-archive-keyring")
        for folder in ("lists/partial", "cache/archives/partial"):
            (self.state / folder).mkdir(parents=True, exist_ok=True)
        (self.state / "status").touch()
        (self.state / "sources.list").write_text(f"deb [arch=amd64 signed-by={keyring}] {mirror()} {self.name} main\n")
        say(f"reading the list of packages of Debian {self.name}")
        # apt-get returns 0 when a list could not be had, and says so.
        out = output_of(self._apt("apt-get", "--error-on=any", "update"), f"the list of {self.name} cannot be had")
        if re.search(r"^(Err|W|E):", out, re.M):
            raise Failed(f"the list of {self.name} cannot be had: {out.strip()}")

    def forget(self) -> None:
        """Removes the list: by the next time, it is old."""
        shutil.rmtree(self.state, ignore_errors=True)

    def field(self, package: str, name: str) -> str:
        """A field of the newest version of a package."""
        why = f"Debian {self.name} has no {package}"
        text = output_of(self._apt("apt-cache", "show", "--no-all-versions", package), why)
        found = re.search(rf"^{name}: (.*)$", text, re.M)
        if not found:
            raise Failed(f"{why} with a field {name}")
        return found.group(1)

    def unpack(self, package: str, into: Path) -> None:
        """Downloads a package and unpacks its files; none of its scripts runs."""
        version = self.field(package, "Version")
        say(f"fetching {package} {version} ({self.name})")
        with tempfile.TemporaryDirectory(dir=into.parent, prefix="download.") as folder:
            command = self._apt("apt-get", "download", f"{package}={version}")
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            files = list(Path(folder).glob("*.deb"))
            if done.returncode or not files:
                raise Failed(f"{package} {version} cannot be downloaded: {done.stderr.strip()}")
            output_of(["dpkg-deb", "-x", files[0], into], f"{package} cannot be unpacked")
