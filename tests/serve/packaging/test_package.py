"""The folder of moon package: whole, valid, and what its commands promise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from moon.bundle import Bundle
from moon.cli import main
from moon.errors import BundleError, UsageError
from moon.serve.packaging import package
from tests.bundles import make_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("package") / "tiny").path


@pytest.fixture(scope="module")
def folder(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packaged") / "out"
    package(bundle, out, image="registry.example:5000/team/tiny:1", replicas=3)
    return out


def documents(folder: Path) -> dict[str, Any]:
    """Kubernetes' own manifests by file."""
    return {
        path.name: yaml.safe_load(path.read_text())
        for path in (folder / "kubernetes").iterdir()
        if path.name != "kustomization.yaml"
    }


def test_every_manifest_keeps_the_schema(folder: Path) -> None:
    checker = pytest.importorskip("kubernetes_validate")
    found = documents(folder)
    assert {one["kind"] for one in found.values()} == {
        "Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget"
    }  # fmt: skip
    for document in found.values():
        for minor in (25, 31, 37):
            checker.validate(document, f"1.{minor}.0", strict=True)
    broken = found["deployment.yaml"] | {"specs": {}}
    with pytest.raises(checker.ValidationError):
        checker.validate(broken, "1.31.0", strict=True)


def test_manifests_name_each_other(folder: Path) -> None:
    found = documents(folder)
    listed = yaml.safe_load((folder / "kubernetes" / "kustomization.yaml").read_text())
    assert sorted(listed["resources"]) == sorted(found)
    deployment, service = found["deployment.yaml"], found["service.yaml"]
    template = deployment["spec"]["template"]
    labels = template["metadata"]["labels"]
    for selector in (
        deployment["spec"]["selector"]["matchLabels"],
        service["spec"]["selector"],
        found["pdb.yaml"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector and selector.items() <= labels.items()
    (container,) = template["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert service["spec"]["ports"][0]["targetPort"] in ports
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] in ports
    target = found["hpa.yaml"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    assert found["hpa.yaml"]["spec"]["minReplicas"] == 3
    assert container["image"] == "registry.example:5000/team/tiny:1"
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in template["spec"]["volumes"]}
    # It has to have time for what it promises.
    grace = int(container["env"][0]["value"])
    assert template["spec"]["terminationGracePeriodSeconds"] >= grace + 30


def test_kserve_runs_the_same_container(folder: Path) -> None:
    service = yaml.safe_load((folder / "kserve" / "inferenceservice.yaml").read_text())
    assert (service["apiVersion"], service["kind"]) == (
        "serving.kserve.io/v1beta1", "InferenceService"
    )  # fmt: skip
    predictor = service["spec"]["predictor"]
    (container,) = predictor["containers"]
    deployed = documents(folder)["deployment.yaml"]["spec"]["template"]["spec"]["containers"][0]
    assert container["name"] == "kserve-container"
    for key in ("image", "args", "resources", "volumeMounts"):
        assert container[key] == deployed[key]


def test_bundles_are_copied_whole(bundle: Path, folder: Path) -> None:
    version = Bundle.open(bundle).manifest.sha256
    for copy in ("bundle", "bento/bundle"):
        assert Bundle.open(folder / copy).manifest.sha256 == version
    ignored = (folder / ".dockerignore").read_text().split()
    copied = [
        line.split()[1].rstrip("/")
        for line in (folder / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY")
    ]
    assert ignored[0] == "*" and [f"!{name}" for name in sorted(copied)] == sorted(ignored[1:])
    assert all((folder / name).is_dir() for name in copied)


def test_nothing_is_left_to_fill_in(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and "bundle" not in path.parts:
            text = path.read_text()
            assert "{{" not in text and "}}" not in text, path


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("CIFAR-10 ResNet", "cifar-10-resnet"),
        ("99 luftballons", "moon-99-luftballons"),
        ("月", "moon"),
        ('x"; rm -rf / #\n- evil: {{ 7 * 7 }}', "x-rm-rf-evil-7-7"),
        ("a" * 80 + "-b", "a" * 50),
    ],
)
def test_names_are_made_fit(bundle: Path, tmp_path: Path, name: str, slug: str) -> None:
    from moon.bundle import write_bundle

    opened = Bundle.open(bundle)
    plain = opened.manifest.to_json()
    fields = {key: plain[key] for key in plain if key not in ("version", "sha256", "files")}
    files = {path: opened.file(path) for path in opened.manifest.files}
    fields["name"] = name
    write_bundle(tmp_path / "named", manifest_fields=fields, files=files)
    package(tmp_path / "named", tmp_path / "out")
    found = documents(tmp_path / "out")
    assert {one["metadata"]["name"] for one in found.values()} == {slug}
    bento = yaml.safe_load((tmp_path / "out" / "bento" / "bentofile.yaml").read_text())
    assert set(bento) == {"service", "description", "include", "python"}
    comments = (tmp_path / "out" / "Dockerfile").read_text().splitlines()
    instructions = [line.split()[0] for line in comments if line and line[0] not in "# "]
    assert set(instructions) <= {
        "FROM", "COPY", "RUN", "USER", "ENV", "EXPOSE", "STOPSIGNAL", "ENTRYPOINT", "CMD"
    }  # fmt: skip


def test_what_is_there_is_not_overwritten(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    package(bundle, out)
    with pytest.raises(UsageError, match="exists"):
        package(bundle, out)
    package(bundle, out, force=True, replicas=7)
    assert documents(out)["hpa.yaml"]["spec"]["maxReplicas"] == 35
    (out / "nginx.conf").unlink()
    with pytest.raises(UsageError, match="other files"):
        package(bundle, out, force=True)


@pytest.mark.parametrize("image", ["", "Upper/case:1", "a b", 'x"\n  y', "-x", "x:"])
def test_what_is_no_image_is_refused(bundle: Path, tmp_path: Path, image: str) -> None:
    if image:
        with pytest.raises(UsageError, match="no name of an image"):
            package(bundle, tmp_path / "out", image=image)
    assert not (tmp_path / "out").exists()


def test_a_bundle_without_a_gate_is_refused(tmp_path: Path) -> None:
    make_bundle(tmp_path / "tiny", calibrated=False)
    with pytest.raises(BundleError, match="is not calibrated, so a service"):
        package(tmp_path / "tiny", tmp_path / "out")


def test_the_command_says_what_it_wrote(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["package", str(bundle), "--out", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "kubernetes/deployment.yaml" in found["files"]
    assert all((tmp_path / "out" / name).exists() for name in found["files"])
    assert main(["package", str(bundle), "--out", str(tmp_path / "two")]) == 0
    assert "kubectl apply" in capsys.readouterr().out
