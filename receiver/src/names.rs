//! The named points of a group: a small text file that is replaced whole, and what it says in memory.
//!
//! ```text
//! TWNAMES1 3f29c0de
//! before-upgrade 1.4711
//! ```
//!
//! The number is the CRC-32 of what follows its line. Always holds: a name that was answered is on the disk; a named point is not given up. A file that is
//! damaged keeps every point, until somebody repairs or removes it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use proto::{Name, Point};

use crate::disk::Disk;

/// The file in the group's folder.
pub(crate) const NAMES_FILE: &str = "names";
const BUILDING_FILE: &str = ".new-names";
const MAGIC: &str = "TWNAMES1";
/// Names a group may have; one more is refused.
pub const NAMES_MAX: usize = 1000;

/// Why a point is not named.
#[derive(Debug, thiserror::Error)]
pub enum NameError {
    /// The name is of another point.
    #[error("the name '{name}' is of point {point}: take another one, or remove it with --unname")]
    Taken {
        /// The name.
        name: Name,
        /// Its point.
        point: Point,
    },
    /// No such name.
    #[error("no point has the name '{name}'")]
    Unknown {
        /// The name.
        name: Name,
    },
    /// Too many.
    #[error("the group has {NAMES_MAX} names: remove some with --unname")]
    Full,
    /// The file is not what was written.
    #[error("{}: damaged in line {line}: repair or remove it; until then no point is given up", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where.
        line: usize,
    },
    /// The file cannot be read or written.
    #[error("{}: cannot {what} the names: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// The names of one group.
#[derive(Debug)]
pub(crate) struct Names {
    folder: PathBuf,
    /// What holds; a name is here before it is on the disk, so that no fold comes between.
    now: Mutex<BTreeMap<Name, Point>>,
    /// What is wrong with the file.
    damage: Option<NameError>,
    /// One change at a time.
    changing: Mutex<()>,
}

impl Names {
    /// Reads the names of a group. What is wrong with them is told by [`damage`](Self::damage).
    pub(crate) fn open(disk: &Disk, folder: &Path) -> Self {
        let (now, damage) = match read(disk, folder) {
            Ok(names) => (names, None),
            Err(error) => {
                tracing::error!("{error}");
                (BTreeMap::new(), Some(error))
            }
        };
        Self { folder: folder.to_owned(), now: Mutex::new(now), damage, changing: Mutex::default() }
    }

    /// Why no point may be given up.
    pub(crate) fn damage(&self) -> Option<&NameError> {
        self.damage.as_ref()
    }

    pub(crate) fn all(&self) -> BTreeMap<Name, Point> {
        self.now.lock().clone()
    }

    pub(crate) fn points(&self) -> BTreeSet<Point> {
        self.now.lock().values().copied().collect()
    }

    /// Names a point, of which `holds` says whether it is there: from when that is said, the point stays.
    pub(crate) fn set(&self, disk: &Disk, name: &Name, point: Point, holds: &mut dyn FnMut() -> bool) -> Result<bool, NameError> {
        let _one = self.changing.lock();
        self.writable()?;
        {
            let mut now = self.now.lock();
            match now.get(name) {
                Some(same) if *same == point => return Ok(true),
                Some(other) => return Err(NameError::Taken { name: name.clone(), point: *other }),
                None if now.len() >= NAMES_MAX => return Err(NameError::Full),
                None => {}
            }
            now.insert(name.clone(), point);
        }
        let written = if holds() { self.write(disk).map(|()| true) } else { Ok(false) };
        if !matches!(written, Ok(true)) {
            self.now.lock().remove(name);
        }
        written
    }

    /// Takes a name away; its point is kept or given up as any other.
    pub(crate) fn remove(&self, disk: &Disk, name: &Name) -> Result<Point, NameError> {
        let _one = self.changing.lock();
        self.writable()?;
        let unknown = || NameError::Unknown { name: name.clone() };
        let point = self.now.lock().get(name).copied().ok_or_else(unknown)?;
        // On the disk first: until then the point stays.
        let mut left = self.all();
        left.remove(name);
        write(disk, &self.folder, &left)?;
        self.now.lock().remove(name);
        Ok(point)
    }

    fn writable(&self) -> Result<(), NameError> {
        match &self.damage {
            Some(NameError::Damaged { path, line }) => Err(NameError::Damaged { path: path.clone(), line: *line }),
            Some(_) => {
                let path = self.folder.join(NAMES_FILE);
                Err(NameError::Io { path, what: "read", source: io::ErrorKind::InvalidData.into() })
            }
            None => Ok(()),
        }
    }

    fn write(&self, disk: &Disk) -> Result<(), NameError> {
        write(disk, &self.folder, &self.all())
    }
}

fn write(disk: &Disk, folder: &Path, names: &BTreeMap<Name, Point>) -> Result<(), NameError> {
    let lines: String = names.iter().map(|(name, point)| format!("{name} {point}\n")).collect();
    let text = format!("{MAGIC} {:08x}\n{lines}", crc32fast::hash(lines.as_bytes()));
    let (path, building) = (folder.join(NAMES_FILE), folder.join(BUILDING_FILE));
    let replace = || -> io::Result<()> {
        if building.exists() {
            disk.remove_file(&building)?;
        }
        let file = disk.create_file(&building)?;
        file.write_all_at(text.as_bytes(), 0)?;
        file.sync_data()?;
        disk.rename(&building, &path)?;
        disk.sync_folder(folder)
    };
    replace().map_err(|source| NameError::Io { path: path.clone(), what: "write", source })
}

fn read(disk: &Disk, folder: &Path) -> Result<BTreeMap<Name, Point>, NameError> {
    let path = folder.join(NAMES_FILE);
    if !path.exists() {
        return Ok(BTreeMap::new());
    }
    // What a killed process has renamed is answered with from now on.
    let settled = disk.sync_folder(folder).and_then(|()| disk.open_settled(&path).map(drop));
    let text = settled.and_then(|()| std::fs::read_to_string(&path));
    let text = text.map_err(|source| NameError::Io { path: path.clone(), what: "read", source })?;
    parse(&text).map_err(|line| NameError::Damaged { path, line })
}

/// The names in a file's text, or the line that does not fit.
fn parse(text: &str) -> Result<BTreeMap<Name, Point>, usize> {
    let (head, lines) = text.split_once('\n').ok_or(1_usize)?;
    let crc = head.strip_prefix(MAGIC).and_then(|rest| u32::from_str_radix(rest.strip_prefix(' ')?, 16).ok());
    let mut names = BTreeMap::new();
    for (i, line) in lines.lines().enumerate() {
        let entry = line.split_once(' ').and_then(|(name, point)| Some((name.parse().ok()?, point.parse().ok()?)));
        let (name, point) = entry.filter(|_| names.len() < NAMES_MAX).ok_or(i + 2)?;
        names.insert(name, point);
    }
    if crc == Some(crc32fast::hash(lines.as_bytes())) { Ok(names) } else { Err(1) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        text.parse().unwrap()
    }

    /// Would catch names that a start does not find, a change that is half there, and a damaged file that is taken for no names.
    #[test]
    fn names_are_found_again_and_damage_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::default();
        let open = || Names::open(&disk, dir.path());
        let names = open();
        assert!(names.all().is_empty() && names.damage().is_none());
        let (one, two): (Point, Point) = ("1.5".parse().unwrap(), "2.7".parse().unwrap());
        assert!(names.set(&disk, &name("before-upgrade"), one, &mut || true).unwrap());
        assert!(names.set(&disk, &name("b"), two, &mut || true).unwrap());
        assert!(!names.set(&disk, &name("c"), two, &mut || false).unwrap());
        assert!(names.set(&disk, &name("b"), two, &mut || true).unwrap());
        assert!(matches!(names.set(&disk, &name("b"), one, &mut || true), Err(NameError::Taken { .. })));
        std::fs::write(dir.path().join(BUILDING_FILE), "left by a kill").unwrap();
        let again = open();
        assert_eq!(again.all(), names.all());
        assert_eq!(again.points().into_iter().collect::<Vec<_>>(), [one, two]);
        assert_eq!(again.remove(&disk, &name("b")).unwrap(), two);
        assert!(matches!(again.remove(&disk, &name("b")), Err(NameError::Unknown { .. })));
        assert_eq!(open().all().len(), 1);
        let path = dir.path().join(NAMES_FILE);
        let whole = std::fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut bad = whole.clone();
            bad[at] ^= 1;
            std::fs::write(&path, bad).unwrap();
            let damaged = open();
            assert!(damaged.damage().is_some(), "byte {at}");
            assert!(damaged.set(&disk, &name("x"), one, &mut || true).is_err());
        }
    }
}
