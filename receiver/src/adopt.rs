//! Images that were carried over by hand: they become the base of a group that is not there yet.
//!
//! The base of such a group is of epoch 0, which is no epoch: no point shows it, nothing can be activated, drilled or exported from it. To its
//! primary it is a copy of another history, so all of it is compared by hash, and the first epoch, which makes the first point, brings what differs.
//! Always holds: the group appears under its name when all of it is durable, and a group that is there is not touched.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use proto::fencing::GroupRole;
use proto::units::BLOCK_BYTES;
use proto::{EpochId, Fingerprint, Generation, Name, Point};
use rustix::fs::{SeekFrom, seek};

use crate::base::{SumsFile, sums_of, sums_path};
use crate::core::Cause;
use crate::disk::Disk;
use crate::journal::FIRST_SEGMENT;
use crate::node::Node;
use crate::store::{StoreError, at};
use crate::superblock::{Superblock, Volume};

/// Bytes copied at once.
const PIECE_BYTES: usize = 1 << 20;
/// Zeroes of this length become a hole, also if the image has them written.
const HOLE_BYTES: usize = 64 << 10;
const QCOW2_MAGIC: &[u8] = b"QFI\xfb";

/// Why images are not adopted.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// The group is there.
    #[error(
        "group '{client}/{group}' is here already: adopt an image before its primary connects for the first time; without any point it can be \
         moved out of the store while this node is stopped"
    )]
    Exists {
        /// The client.
        client: Name,
        /// The group.
        group: Name,
    },
    /// An image cannot be read.
    #[error("{}: cannot read the image at offset {offset}: {source}", path.display())]
    Image {
        /// The image.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// Another format.
    #[error("{}: is a qcow2 image: make a raw one first, with qemu-img convert -O raw", path.display())]
    Qcow2 {
        /// The image.
        path: PathBuf,
    },
    /// Nothing in it, or more than a disk can have.
    #[error("{}: {bytes} bytes are no disk: a disk has 1 byte to 16 TiB", path.display())]
    Size {
        /// The image.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// A limit of the client.
    #[error("client '{client}' has reached its limit of groups or of bytes of their disks")]
    Limit {
        /// The client.
        client: Name,
    },
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The new group cannot be opened.
    #[error("{0}")]
    Open(Cause),
    /// Whoever asked for it does not want it any more, or the node stops.
    #[error("adopting was stopped; nothing of it is left")]
    Stopped,
}

/// What is adopted.
#[derive(Clone, Debug)]
pub struct Adoption {
    /// The client whose group it becomes.
    pub client: Name,
    /// Its key.
    pub owner: Fingerprint,
    /// The group.
    pub group: Name,
    /// Its disks, in the order of the primary's configuration, and their images.
    pub images: Vec<(Name, PathBuf)>,
}

/// How far it is.
#[derive(Debug, Default)]
pub struct AdoptProgress {
    /// Bytes of the images dealt with.
    pub done_bytes: AtomicU64,
    /// Their size.
    pub total_bytes: AtomicU64,
    /// Set by whoever does not want it any more.
    pub stop: AtomicBool,
}

/// Copies the images and makes the group. Blocks on file I/O for as long as that takes.
pub(crate) fn adopt(node: &Node, adoption: &Adoption, progress: &AdoptProgress) -> Result<(), AdoptError> {
    let Adoption { client, owner, group, images } = adoption;
    if node.has(client, group) {
        return Err(AdoptError::Exists { client: client.clone(), group: group.clone() });
    }
    let mut volumes = Vec::new();
    for (name, path) in images {
        volumes.push(Volume { name: name.clone(), size_bytes: size_of(path)? });
    }
    progress.total_bytes.store(volumes.iter().map(|v| v.size_bytes).sum(), Ordering::Relaxed);
    let block = Superblock {
        group_id: rand::random(),
        owner: *owner,
        generation: Generation(1),
        role: GroupRole::Replica,
        base: Some(Point { generation: Generation(1), epoch: EpochId(0) }),
        base_seal: Default::default(),
        folding: None,
        synced: None,
        fork: None,
        first_segment: FIRST_SEGMENT,
        created_unix_us: crate::clock::unix_us(),
        volumes,
    };
    let disk = node.store.disk();
    let mut sources = images.iter().map(|(_, path)| path.as_path());
    let mut base = |path: &Path, volume: &Volume| match sources.next() {
        Some(source) => copy(disk, (source, path), volume.size_bytes, progress),
        None => Err(AdoptError::Stopped),
    };
    let building = node.store.adopting(client, group);
    let made = node.store.build(&building, block, &mut base).and_then(|()| node.take_in(client, group, &building));
    if made.is_err()
        && building.exists()
        && let Err(error) = disk.remove_folder(&building)
    {
        tracing::warn!("{}", at(&building, "remove what adopting left")(error));
    }
    made
}

fn size_of(path: &Path) -> Result<u64, AdoptError> {
    let failed = |source| AdoptError::Image { path: path.to_owned(), offset: 0, source };
    let file = File::open(path).map_err(failed)?;
    let kind = file.metadata().map_err(failed)?.file_type();
    if kind.is_dir() {
        return Err(failed(io::ErrorKind::IsADirectory.into()));
    }
    let bytes = seek(&file, SeekFrom::End(0)).map_err(|e| failed(e.into()))?;
    let mut head = [0; 4];
    if file.read_at(&mut head, 0).map_err(failed)? == head.len() && head == QCOW2_MAGIC {
        return Err(AdoptError::Qcow2 { path: path.to_owned() });
    }
    if bytes == 0 || bytes > proto::units::VOLUME_BYTES_MAX {
        Err(AdoptError::Size { path: path.to_owned(), bytes })
    } else {
        Ok(bytes)
    }
}

/// Copies an image to a base, without its holes and its zeroes, and makes the checksums of what is copied.
fn copy(disk: &Disk, (from, to): (&Path, &Path), size: u64, progress: &AdoptProgress) -> Result<(), AdoptError> {
    let image = |offset, source| AdoptError::Image { path: from.to_owned(), offset, source };
    let base = |source| AdoptError::Store(at(to, "write the base")(source));
    let source = File::open(from).map_err(|e| image(0, e))?;
    let file = disk.create_file(to).and_then(|file| file.set_len(size).map(|()| file)).map_err(base)?;
    let sums = SumsFile::create(disk, &sums_path(to), size).map_err(base)?;
    let mut piece = vec![0; PIECE_BYTES];
    let mut offset = 0;
    while offset < size {
        if progress.stop.load(Ordering::Relaxed) {
            return Err(AdoptError::Stopped);
        }
        // A device has no holes to tell of; then all of it is data.
        let data = match seek(&source, SeekFrom::Data(offset)) {
            // In whole blocks, whose checksums are made.
            Ok(data) if data < size => data - data % BLOCK_BYTES,
            Ok(_) | Err(rustix::io::Errno::NXIO) => size,
            Err(_) => offset,
        };
        progress.done_bytes.fetch_add(data - offset, Ordering::Relaxed);
        offset = data;
        let bytes = (size - offset).min(PIECE_BYTES as u64) as usize;
        let content = piece.get_mut(..bytes).unwrap_or_default();
        source.read_exact_at(content, offset).map_err(|e| image(offset, e))?;
        for (part, at) in content.chunks(HOLE_BYTES).zip((offset..).step_by(HOLE_BYTES)) {
            if part.iter().any(|byte| *byte != 0) {
                file.append_at(part, at).map_err(base)?;
                let of_part: Vec<_> = sums_of(at / BLOCK_BYTES, part).collect();
                sums.put(&of_part).map_err(base)?;
            }
        }
        progress.done_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        offset += bytes as u64;
    }
    file.sync_all().and_then(|()| sums.sync()).map_err(base)
}
