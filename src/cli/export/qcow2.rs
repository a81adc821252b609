//! Writes a qcow2 image, version 3, from its beginning to its end.
//!
//! After docs/interop/qcow2.txt of QEMU. Clusters of 64 KiB, 16-bit reference counts, no compression, no snapshots, no backing file. Each cluster
//! of the file is used once, so reference counts need no bookkeeping: they are written at the end, one for each cluster there is. Data comes
//! in order, so one table of the second level is held at a time; it is written when the disk goes on behind what it covers.
//! The header is written last: a file that is not whole has none.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::image::{Image, is_zero};

const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// Entries of a table in a cluster.
const ENTRIES: u64 = CLUSTER / 8;
/// Bytes of the disk that a table of the second level covers.
const L2_BYTES: u64 = ENTRIES * CLUSTER;
/// Reference counts in a cluster.
const COUNTS: u64 = CLUSTER / 2;
/// This entry's cluster is used once and may be written in place.
const COPIED: u64 = 1 << 63;
/// Log2 of the bits of a reference count.
const REFCOUNT_ORDER: u32 = 4;
const HEADER_BYTES: u32 = 104;

/// An image that is being written.
#[derive(Debug)]
pub(super) struct Qcow2 {
    file: File,
    size: u64,
    /// The next cluster of the file.
    next: u64,
    l1: Vec<u64>,
    /// The table that covers what is being written, and its number.
    l2: Option<(usize, Vec<u64>)>,
    /// The cluster that is being filled, and its number on the disk.
    open: Option<(u64, Vec<u8>)>,
}

impl Qcow2 {
    pub(super) fn new(file: File, size: u64) -> io::Result<Self> {
        let tables = usize::try_from(size.div_ceil(L2_BYTES)).map_err(io::Error::other)?;
        // Whole sectors, as QEMU counts a raw image; cluster 0 is the header's.
        Ok(Self { file, size: size.next_multiple_of(512), next: 1, l1: vec![0; tables], l2: None, open: None })
    }

    /// Takes the next `clusters` of the file; returns the offset of the first.
    fn take(&mut self, clusters: u64) -> u64 {
        let offset = self.next * CLUSTER;
        self.next += clusters;
        offset
    }

    fn put(&mut self, content: &[u8]) -> io::Result<u64> {
        let offset = self.take(1);
        self.file.write_all_at(content, offset)?;
        Ok(offset)
    }

    /// Writes the open cluster, unless it is all zeroes.
    fn close_cluster(&mut self) -> io::Result<()> {
        let Some((number, content)) = self.open.take() else { return Ok(()) };
        if is_zero(&content) {
            return Ok(());
        }
        let table = usize::try_from(number / ENTRIES).map_err(io::Error::other)?;
        if self.l2.as_ref().is_none_or(|(open, _)| *open != table) {
            self.close_table()?;
            self.l2 = Some((table, vec![0; ENTRIES as usize]));
        }
        let offset = self.put(&content)?;
        if let Some(entry) = self.l2.as_mut().and_then(|(_, entries)| entries.get_mut((number % ENTRIES) as usize)) {
            *entry = offset | COPIED;
        }
        Ok(())
    }

    fn close_table(&mut self) -> io::Result<()> {
        let Some((table, entries)) = self.l2.take() else { return Ok(()) };
        let offset = self.put(&big_endian(&entries))?;
        if let Some(entry) = self.l1.get_mut(table) {
            *entry = offset | COPIED;
        }
        Ok(())
    }

    fn header(&self, l1_at: u64, counts_at: u64, counts_clusters: u64) -> io::Result<Vec<u8>> {
        let small = |n: u64| u32::try_from(n).map_err(io::Error::other);
        let mut out = b"QFI\xfb".to_vec();
        let words = |out: &mut Vec<u8>, words: &[u32]| words.iter().for_each(|w| out.extend_from_slice(&w.to_be_bytes()));
        let longs = |out: &mut Vec<u8>, longs: &[u64]| longs.iter().for_each(|l| out.extend_from_slice(&l.to_be_bytes()));
        // version; backing file: offset, length
        words(&mut out, &[3]);
        longs(&mut out, &[0]);
        words(&mut out, &[0, CLUSTER_BITS]);
        longs(&mut out, &[self.size]);
        // encryption; entries of the first level
        words(&mut out, &[0, small(self.l1.len() as u64)?]);
        longs(&mut out, &[l1_at, counts_at]);
        words(&mut out, &[small(counts_clusters)?, 0]);
        // snapshots; features: incompatible, compatible, autoclear
        longs(&mut out, &[0, 0, 0, 0]);
        words(&mut out, &[REFCOUNT_ORDER, HEADER_BYTES]);
        debug_assert_eq!(out.len(), HEADER_BYTES as usize);
        // The end of the header extensions is eight zeroes, as is the rest of the cluster.
        out.resize(CLUSTER as usize, 0);
        Ok(out)
    }
}

fn big_endian(entries: &[u64]) -> Vec<u8> {
    entries.iter().flat_map(|entry| entry.to_be_bytes()).collect()
}

impl Image for Qcow2 {
    fn write(&mut self, mut offset: u64, content: &[u8]) -> io::Result<()> {
        let mut rest = content;
        while !rest.is_empty() {
            let number = offset / CLUSTER;
            if self.open.as_ref().is_none_or(|(open, _)| *open != number) {
                self.close_cluster()?;
                self.open = Some((number, vec![0; CLUSTER as usize]));
            }
            let from = (offset % CLUSTER) as usize;
            let (now, later) = rest.split_at(rest.len().min(CLUSTER as usize - from));
            if let Some(to) = self.open.as_mut().and_then(|(_, cluster)| cluster.get_mut(from..from + now.len())) {
                to.copy_from_slice(now);
            }
            offset += now.len() as u64;
            rest = later;
        }
        Ok(())
    }

    fn finish(mut self) -> io::Result<()> {
        self.close_cluster()?;
        self.close_table()?;
        let l1 = big_endian(&self.l1);
        let l1_at = self.take((l1.len() as u64).div_ceil(CLUSTER));
        self.file.write_all_at(&l1, l1_at)?;
        // Blocks of counts count themselves and their table: grown until they cover all.
        let used = self.next;
        let (mut blocks, mut table) = (0_u64, 0_u64);
        loop {
            let (blocks_needed, table_needed) = ((used + blocks + table).div_ceil(COUNTS), blocks.div_ceil(ENTRIES).max(1));
            if (blocks_needed, table_needed) == (blocks, table) {
                break;
            }
            (blocks, table) = (blocks_needed, table_needed);
        }
        let table_at = self.take(table);
        let blocks_at = self.take(blocks);
        let entries: Vec<u64> = (0..blocks).map(|i| blocks_at + i * CLUSTER).collect();
        self.file.write_all_at(&big_endian(&entries), table_at)?;
        for block in 0..blocks {
            let counted = (self.next - block * COUNTS).min(COUNTS);
            let counts: Vec<u8> = (0..COUNTS).flat_map(|i| u16::from(i < counted).to_be_bytes()).collect();
            self.file.write_all_at(&counts, blocks_at + block * CLUSTER)?;
        }
        // Whole clusters to the end, as readers of the tables expect.
        self.file.set_len(self.next * CLUSTER)?;
        self.file.write_all_at(&self.header(l1_at, table_at, table)?, 0)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::Command;

    use super::*;
    use crate::cli::export::image::Raw;

    fn qemu_img(args: &[&str]) {
        let output = Command::new("qemu-img")
            .args(args)
            .output()
            .expect("this test needs qemu-img: install the Debian package qemu-utils");
        assert!(
            output.status.success(),
            "qemu-img {}: {}{}",
            args.join(" "),
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }

    /// QEMU's own check of every reference and its own comparison with the raw image, for disks that end within a cluster, that need several tables
    /// of both kinds, that have nothing, and for pieces of any size.
    #[test]
    fn qemu_finds_nothing_wrong_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let (raw_path, path) = (dir.path().join("raw"), dir.path().join("qcow2"));
        let gib = 1_u64 << 30;
        let pieces: &[(u64, &[(u64, usize)])] = &[
            (0, &[]),
            (512, &[(0, 512)]),
            (100 << 20, &[]),
            (3 * CLUSTER + 5, &[(0, 1), (4096, 200), (2 * CLUSTER + 7, CLUSTER as usize - 2)]),
            (20 * gib + 4096, &[(0, 1 << 20), (gib - 100, 200), (gib + 4096, 4096), (19 * gib, 3 << 20), (20 * gib, 4096)]),
            // More clusters than one block of reference counts speaks of: 2 GiB of data would be slow, tables do as well.
            (15 << 40, &[(0, 4096), ((15 << 40) - 4096, 4096)]),
        ];
        for (size, written) in pieces {
            let file = |path: &Path| File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap();
            let (mut raw, mut qcow2) = (Raw::new(file(&raw_path), *size).unwrap(), Qcow2::new(file(&path), *size).unwrap());
            for (offset, bytes) in *written {
                let content: Vec<u8> = (0..*bytes).map(|i| (i % 251) as u8 + 1).collect();
                raw.write(*offset, &content).unwrap();
                qcow2.write(*offset, &content).unwrap();
            }
            raw.finish().unwrap();
            qcow2.finish().unwrap();
            let (raw, qcow2) = (raw_path.to_str().unwrap(), path.to_str().unwrap());
            qemu_img(&["check", "-f", "qcow2", qcow2]);
            if *size < 1 << 40 {
                qemu_img(&["compare", "-f", "raw", "-F", "qcow2", raw, qcow2]);
            }
        }
    }

    /// Reference counts that fill more than one cluster, without the gigabytes: the clusters are taken, not written.
    #[test]
    fn reference_counts_of_a_large_file_cover_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qcow2");
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        let size = 5 << 30;
        let mut image = Qcow2::new(file, size).unwrap();
        // As a disk full of data, every entry of the tables in order.
        for table in 0..size.div_ceil(L2_BYTES) {
            let entries = (0..ENTRIES).map(|_| image.take(1) | COPIED).collect();
            image.l2 = Some((table as usize, entries));
            image.close_table().unwrap();
        }
        assert!(image.next > 2 * COUNTS);
        image.finish().unwrap();
        qemu_img(&["check", "-f", "qcow2", path.to_str().unwrap()]);
    }
}
