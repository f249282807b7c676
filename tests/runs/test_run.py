"""What run.json says about the machine."""

from importlib import metadata

from algpt2.runs.run import environment


def test_the_version_of_a_package_under_another_name_is_found(monkeypatch, tmp_path):
    """As `tensorflow` out of tensorflow-tpu."""
    folder = tmp_path / "tensorflow_tpu-2.20.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Name: tensorflow-tpu\nVersion: 2.20.0\n")
    (folder / "top_level.txt").write_text("tensorflow\n")
    monkeypatch.syspath_prepend(tmp_path)
    known = metadata.version

    def version(name):
        if name == "tensorflow":
            raise metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(metadata, "version", version)
    found = environment()["versions"]
    assert found["tensorflow"] == "2.20.0"
    assert found["numpy"] == known("numpy")
