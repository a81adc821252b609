//! The first copy of a sparse disk: what is sent, what the copy takes, and what `status` tells while it runs.
//!
//! Would catch: holes or zeroes that travel as data, a copy that is not sparse, progress that is not shown or does not end, a
//! copy that can be activated before it is whole.

mod support;

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;
use support::nbd::Nbd;
use support::node::COMMIT_WITHIN;
use support::site::Site;
use support::{eventually, noise, text};

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 512 * MIB;
/// Places and lengths of data on the disk, in MiB: the rest is holes, but for [`ZEROES`].
const DATA: &[(u64, u64)] = &[(0, 1), (50, 63), (200, 64), (300, 2), (511, 1)];
/// Zeroes that are written out, in MiB.
const ZEROES: (u64, u64) = (400, 32);
/// Headers of frames, compression that does not help, QUIC.
const OVERHEAD_PERCENT: u64 = 3;

/// Bytes that the files below a folder take on the disk.
fn allocated(path: &Path) -> u64 {
    let meta = std::fs::symlink_metadata(path).expect("a file");
    if !meta.is_dir() {
        return meta.blocks() * 512;
    }
    std::fs::read_dir(path).expect("a folder").map(|entry| allocated(&entry.expect("an entry").path())).sum()
}

#[test]
fn a_sparse_disk_is_sent_and_stored_sparse() {
    let mut site = Site::new();
    let image = site.image("image.raw", DISK_BYTES);
    let file = OpenOptions::new().write(true).open(&image).expect("the image");
    for (at, mib) in DATA {
        file.write_all_at(&noise(*at, (mib * MIB) as usize), at * MIB).expect("a write");
    }
    file.write_all_at(&vec![0; (ZEROES.1 * MIB) as usize], ZEROES.0 * MIB).expect("a write");
    let data_bytes = DATA.iter().map(|(_, mib)| mib * MIB).sum::<u64>();
    // Slow enough to be seen.
    let group = site.group("db", &image);
    site.primary.configure(&group.replacen("[[group]]\n", "[[group]]\nrate_limit = \"200 Mbit/s\"\n", 1));
    site.receiver.start();
    site.primary.start();

    let shown = eventually("progress is shown", COMMIT_WITHIN, || {
        let status = site.primary.primary("db");
        assert!(status["committed"].is_null(), "the first sync ended before its progress was seen: {status:#}");
        let pass = &status["pass"];
        let number = |key: &str| pass[key].as_u64();
        let (done, total, rate) = (number("done_bytes")?, number("total_bytes")?, number("rate_bytes_per_s")?);
        (done > 0 && done < total).then_some(())?;
        assert!(total <= DISK_BYTES && rate > 0 && number("left_s").is_some(), "{status:#}");
        assert_eq!(status["state"], "first-sync", "{status:#}");
        Some(status)
    });
    println!("{}", shown["pass"]);
    // Before it is whole there is nothing to fail over to. The primary is held meanwhile, so that it does not become whole.
    site.primary.signal(Signal::STOP);
    let refused = site.receiver.ask(&["failover", "db", "--export", "unix:/nonexistent/x.sock", "--yes"]);
    site.primary.signal(Signal::CONT);
    let said = text(&refused);
    assert!(!refused.status.success() && said.contains("its first sync is not complete"), "{said}");

    let status = site.primary.committed("db");
    assert!(status["state"] == "streaming" && status["pass"].is_null(), "{status:#}");
    let number = |key: &str| status[key].as_u64().expect("a number");
    let most = data_bytes + data_bytes * OVERHEAD_PERCENT / 100;
    println!(
        "{} MiB of data: captured {}, sent {}, wire {}",
        data_bytes / MIB,
        number("captured_bytes"),
        number("sent_bytes"),
        number("wire_bytes")
    );
    assert_eq!(number("captured_bytes"), data_bytes, "only data is captured as data");
    assert_eq!(number("zero_bytes"), DISK_BYTES - data_bytes, "the rest travels as extents");
    assert!((data_bytes..most).contains(&number("sent_bytes")), "{status:#}");
    let stored = allocated(&site.store);
    assert!(
        (data_bytes..most + 16 * MIB).contains(&stored),
        "{stored} bytes are allocated in the store for {data_bytes} of data"
    );

    // A disk that becomes sparser makes the copy no larger.
    let mut nbd = Nbd::connect(&site.socket("db"), "data").expect("the export");
    let zeroed = 63 * MIB / 4;
    nbd.write(50 * MIB, &vec![0; zeroed as usize]).expect("a write of zeroes");
    drop(nbd);
    let status = site.primary.committed("db");
    assert_eq!(status["captured_bytes"].as_u64(), Some(data_bytes), "zeroes that are written travel as extents too");
    assert!(allocated(&site.store) < stored + MIB, "and take no space");
    site.copy_equals("db", &image);
    // Once it is active and flat, its own file takes the space of the data once more, and none for anything else.
    eventually("the active copy is flat", COMMIT_WITHIN, || {
        (site.receiver.copy("primary", "db")["active"]["flatten"]["state"] == "flat").then_some(())
    });
    let most = stored + data_bytes - zeroed + 2 * MIB;
    eventually("and sparse", Duration::from_secs(5), || (allocated(&site.store) < most).then_some(()));
}
