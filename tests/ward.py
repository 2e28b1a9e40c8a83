"""A hospital that is full of names, each in one place alone."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from pydicom import Dataset, dcmread

from sparsecontrast.egress import FILE
from tests.dicom_files import write_dicom
from tests.search import Canary, canary

TAGS = (
    "PatientName", "PatientID", "PatientAddress", "PatientComments", "AccessionNumber", "InstitutionName",
    "ReferringPhysicianName", "StationName", "StudyDescription", "ImageComments", "StudyID", "ProtocolName",
)  # fmt: skip
PATIENTS = 14


class Ward:
    """The files of one site.

    Args:
        folder: new; everything of the site lies below it.
        name: of the site, which is no secret.
        real: a radiograph in DICOM, of which some of its files are made.
    """

    def __init__(self, folder: Path, name: str, real: Path):
        self.folder, self.name, self.real = folder, name, real
        self.canaries: dict[str, Canary] = {}
        self.state = folder / self("state folder")
        self.table = folder / self("data folder")
        self.films = folder / self("second data folder")
        self.index = folder / self("index folder") / f"{self('index file')}.csv"
        self.kit = Path()
        self.done = 1  # answers after which there was nothing left to do
        self.after: dict[int, Callable[[], None]] = {}

    def __call__(self, place: str, digits: bool = False) -> str:
        """The word of a place."""
        return self.canaries.setdefault(place, canary(place, digits)).token

    def write(self, kit: Path) -> None:
        """Write all data, and the site's own file into its kit."""
        self.kit = kit
        self._write_table()
        self._write_films()
        self._write_index()
        with open(kit / "settings.env", "a", encoding="utf-8") as settings:
            for variable in ("WARD", "USER", "LOGNAME", "HOSTNAME"):
                settings.write(f"export {variable}={self(f'environment, {variable}')}\n")
        self.tell(self.from_table())

    def from_table(self) -> list[str]:
        """Say that the images are those of a table with labels."""
        return ["data=csv", f"data.root='{self.table}'", "data.min_images=2"]

    def from_films(self) -> list[str]:
        """Say that the images are those of a folder."""
        return ["data=dicom", f"data.root='{self.films}'", "data.min_images=2"]

    def tell(self, overrides: list[str], **more: Any) -> None:
        """Write ``site.yaml``."""
        told = {"name": self.name, "state_dir": str(self.state), "overrides": overrides, **more}
        (self.kit / "site.yaml").write_text(yaml.safe_dump(told, allow_unicode=True), encoding="utf-8")

    def answers(self) -> int:
        """How many answers have left, or are about to."""
        log = self.state / FILE
        return log.read_bytes().count(b"\n") if log.exists() else 0

    def go_on(self) -> None:
        """Do what is to happen after the answers given so far, once each."""
        while self.done <= self.answers():
            self.after.get(self.done, lambda: None)()
            self.done += 1

    def _write_table(self) -> None:
        rows = []
        for number in range(PATIENTS):
            path = f'{self("sub-folder")}/{self("file name")} {number}, "a";b.dcm'
            self._film(self.table / path, number)
            label = f"{self('label value')}|Nodule" if number % 2 else "Nodule"
            rows.append(
                {"path": path, "patient_id": f"{self('patient of the table')}-{number}", "label": label}
            )
        bad = f"{self('sub-folder')}/{self('broken file')}.dcm"
        (self.table / bad).write_bytes(b"\0" * 128 + b"DICM" + self("bytes of the broken file").encode() * 9)
        rows.append({"path": bad, "patient_id": "nobody", "label": "Nodule"})
        rows.append({"path": f"{self('missing file')}.dcm", "patient_id": "nobody", "label": "Nodule"})
        frame = pd.DataFrame(rows).assign(view="PA")
        frame[self("label column")] = np.arange(len(frame)) % 2
        frame.to_csv(self.table / "index.csv", index=False)

    def _write_films(self) -> None:
        for number in range(PATIENTS):
            name = (f"M\xfcller {self('odd file name')} {number}\n.dcm").encode("latin-1")
            folder = os.path.join(
                os.fsencode(self.films), f"St\xe4tion {self('odd folder')}".encode("latin-1")
            )
            self._film(Path(os.fsdecode(os.path.join(folder, name))), 100 + number)
        torn = self.films / f"{self('torn film')}.dcm"
        self._film(torn, 99)
        torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])

    def _write_index(self) -> None:
        self.index.parent.mkdir()
        ids = ("image_id", "path", "patient_id", "study_id", "site")
        row = {**dict.fromkeys(ids, self("row of the index")), "view": "PA", "split": "train", "boxes": "[]"}
        label = {f"label_{self('label of the index')}": self("cell of the index")}
        pd.DataFrame([{**row, "height": 9, "width": 9, **label}]).to_csv(self.index, index=False)

    def _film(self, path: Path, number: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if number % 7 == 0:
            shutil.copy(self.real, path)
        else:
            pixels = np.random.default_rng(number).integers(0, 4096, (48, 48)).astype(np.uint16)
            write_dicom(path, pixels)
        film = dcmread(path)
        self._name(film, number)
        film.save_as(path)

    def _name(self, film: Dataset, number: int) -> None:
        for tag in TAGS:
            end = f"^Jane{number}" if tag == "PatientName" else f"-{number}" if tag == "PatientID" else ""
            setattr(film, tag, f"{self(tag)}{end}")
        film.StudyInstanceUID = f"1.2.826.{self('StudyInstanceUID', digits=True)}.{number}"
        block = film.private_block(0x0011, self("creator of a private tag"), create=True)
        block.add_new(0x01, "LO", self("private tag"))
        film.ViewPosition, film.Modality, film.BodyPartExamined = "PA", "CR", "CHEST"
