"""The image's files, the constraints and the Makefile say the same, and the Dockerfile keeps to its linter's rules."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8"))
SERVICE = COMPOSE["services"]["finlora"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
IGNORED = {
    line.strip()
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    if line[:1] not in ("", "#")
}


def instructions(name: str) -> list[str]:
    """The arguments of each instruction of this name, continuation lines joined, comments left out."""
    text = re.sub(r"\\\n\s*", "", "\n".join(line for line in DOCKERFILE.splitlines() if not line.startswith("#")))
    return re.findall(rf"^{name} (.*)$", text, re.M)


def argument(name: str) -> str:
    return next(value.split("=", 1)[1] for value in instructions("ARG") if value.startswith(f"{name}="))


def test_torch_is_the_makefiles_and_has_its_constraints():
    version = re.search(r"^TORCH \?= (\S+)$", MAKEFILE, re.M)[1]
    assert argument("TORCH") == version
    assert SERVICE["build"]["args"]["TORCH"] == f"${{TORCH:-{version}}}"
    assert (ROOT / "constraints" / f"torch-{version}.txt").is_file()


def test_the_base_has_the_cuda_that_torch_is_built_for():
    constraints = (ROOT / "constraints" / f"torch-{argument('TORCH')}.txt").read_text(encoding="utf-8")
    version = re.search(r"^cuda-toolkit==(\d+\.\d+)", constraints, re.M)[1]
    base = argument("BASE")
    assert re.search(rf":{re.escape(version)}\.\d+-base-ubuntu24\.04$", base)
    assert SERVICE["build"]["args"]["BASE"] == f"${{BASE:-{base}}}"


def test_set_up_is_makes_own_and_all_that_it_needs_is_copied_before():
    assert "make setup" in instructions("RUN")
    assert not [line for line in instructions("RUN") if "pip install" in line and "FLASH_ATTN" not in line]
    prerequisites = re.search(r"^\.venv/\.ready-%: (.*)$", MAKEFILE, re.M)[1].split()
    before = DOCKERFILE[: DOCKERFILE.index("RUN make setup")]
    copied = " ".join(re.findall(r"^COPY --chown=finlora (.*)$", before, re.M)).split()
    for file in ["Makefile", *prerequisites]:
        assert any(file == path or file.startswith(f"{path}/") for path in copied), file
    assert instructions("COPY")[-1] == "--chown=finlora . ." and instructions("RUN")[-1] == "touch .venv/.ready-*"


def test_it_is_make_and_does_not_run_as_root():
    assert instructions("ENTRYPOINT") == ['["make"]'] and instructions("CMD") == ['["help"]']
    assert instructions("USER") == ["${USER_ID}"] and argument("USER_ID") == "1000"
    assert DOCKERFILE.index("\nUSER ") < DOCKERFILE.index("\nCOPY ")


def test_volumes_keep_data_outputs_and_the_cache():
    volumes = set(re.findall(r'"([^"]+)"', instructions("VOLUME")[0]))
    made = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    for folder in volumes - {"/cache"}:  # what commands make, and no folder of the repository
        assert f"{folder.removeprefix('/finlora')}/" in made
    home = re.search(r"HF_HOME=(\S+)", DOCKERFILE)[1]
    mounted = {volume.rsplit(":", 1)[1] for volume in SERVICE["volumes"]}
    assert mounted == volumes - {"/cache"} | {home} and home.startswith("/cache/")


def test_no_secret_can_reach_a_layer():
    assert not re.search(r"^(ARG|ENV|COPY|RUN).*(TOKEN|SECRET|PASSWORD|KEY)", DOCKERFILE, re.M | re.I)
    for entry in SERVICE["environment"]:
        assert not re.match(r"\w*(TOKEN|SECRET|PASSWORD|KEY)\w*=", entry), entry
    assert "HF_TOKEN" in SERVICE["environment"]
    assert {"**/.env", "**/.env.*", "**/.netrc", "**/*.pem", "**/*.key", "/.git/"} <= IGNORED


def test_what_git_ignores_docker_ignores():
    git = {line.strip() for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines() if line.strip()}
    missing = {line for line in git if line not in IGNORED and f"**/{line}" not in IGNORED}
    assert not missing, f"add to .dockerignore: {sorted(missing)}"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for needed in (
        "Makefile",
        "pyproject.toml",
        "scripts/setup.sh",
        "data/sample",
        "recipes",
        "fastdora/plugin/plugin.py",
    ):
        assert not tracked or any(file.startswith(needed) for file in tracked)
        assert f"/{needed.split('/')[0]}/" not in IGNORED


def test_compose_gives_it_all_gpus_and_no_more_rights():
    (devices,) = SERVICE["deploy"]["resources"]["reservations"]["devices"]
    assert devices["count"] == "all" and "gpu" in devices["capabilities"]
    assert SERVICE["security_opt"] == ["no-new-privileges:true"] and not SERVICE.get("privileged")
    build = SERVICE["build"]
    assert (ROOT / "docker" / build["context"] / build["dockerfile"]).resolve() == ROOT / "docker" / "Dockerfile"


@pytest.mark.skipif(not shutil.which("hadolint"), reason="no hadolint on PATH: the Dockerfile was not checked")
def test_hadolint():
    done = subprocess.run(["hadolint", str(ROOT / "docker" / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck on PATH: the scripts were not checked")
def test_shellcheck():
    scripts = [*sorted(ROOT.glob("scripts/*.sh")), *sorted(ROOT.glob("cluster/*.s*")), ROOT / ".ci" / "run"]
    done = subprocess.run(["shellcheck", *map(str, scripts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
