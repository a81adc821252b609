//! Other people's clients against the export: libnbd, QEMU and fio must find what the protocol promises them.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use blockdev::MemoryDevice;
use blockdev::nbd::Export;
use common::{MIB, Server, file_device, noise, run, succeed};

const LIBNBD: &str = "libnbd-bin";
const QEMU: &str = "qemu-utils";

fn nbdinfo(args: &[&str]) -> String {
    succeed(LIBNBD, "nbdinfo", args)
}

#[test]
fn nbdinfo_lists_every_export_and_what_it_can() {
    let server = Server::new(Arc::new(MemoryDevice::new(3 * MIB + 5)));
    let second = Export { read_only: true, ..Export::new("zweite Platte", Arc::new(MemoryDevice::new(512))) };
    server.server.add_export(second).unwrap();
    let uri = server.uri();
    let listed = nbdinfo(&["--list", "--json", &server.uri_of("")]);
    let expected = [
        "\"protocol\": \"newstyle-fixed\"",
        "\"structured\": true",
        "\"export-name\": \"disk\"",
        "\"description\": \"a test disk\"",
        "\"export-size\": 3145733",
        "\"base:allocation\"",
        "\"can_multi_conn\": true",
        "\"can_fast_zero\": true",
        "\"can_df\": true",
        "\"can_cache\": true",
        "\"can_fua\": true",
        "\"block_size_minimum\": 1",
        "\"block_size_preferred\": 4096",
        "\"block_size_maximum\": 33554432",
        "\"export-name\": \"zweite Platte\"",
        "\"export-size\": 512",
        "\"is_read_only\": true",
    ];
    for fact in expected {
        assert!(listed.contains(fact), "{fact} missing in {listed}");
    }
    for can in ["df", "fast-zero", "flush", "fua", "multi-conn", "trim", "write", "zero", "cache", "structured-reply"] {
        nbdinfo(&["--can", can, &uri]);
    }
    assert!(!run(LIBNBD, "nbdinfo", &["--can", "write", &server.uri_of("zweite%20Platte")]).status.success());
    assert!(!run(LIBNBD, "nbdinfo", &["--size", &server.uri_of("neither")]).status.success());
    assert_eq!(nbdinfo(&["--size", &uri]).trim(), "3145733");
}

#[test]
fn nbdcopy_in_and_out_gives_identical_bytes_and_keeps_holes() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::new(file_device(folder.path(), 64 * MIB, false));
    let (source, copy) = (folder.path().join("source"), folder.path().join("copy"));
    let mut image = vec![0; 64 * MIB as usize];
    image[MIB as usize + 3..9 * MIB as usize + 11].copy_from_slice(&noise(1, 8 * MIB as usize + 8));
    image[60 * MIB as usize..][..5000].copy_from_slice(&noise(2, 5000));
    std::fs::write(&source, &image).unwrap();
    let text = |path: &std::path::Path| path.to_str().unwrap().to_owned();
    succeed(LIBNBD, "nbdcopy", &["--flush", &text(&source), &server.uri()]);
    assert!(std::fs::read(folder.path().join("disk.raw")).unwrap() == image, "copied in");
    succeed(LIBNBD, "nbdcopy", &[&server.uri(), &text(&copy)]);
    assert!(std::fs::read(&copy).unwrap() == image, "copied out");
    // For up to 2 s after a write that a slow disk held up, holes are not looked for.
    let until = Instant::now() + Duration::from_secs(30);
    let mut map = nbdinfo(&["--map", "--totals", &server.uri()]);
    while !map.contains("hole,zero") && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(100));
        map = nbdinfo(&["--map", "--totals", &server.uri()]);
    }
    assert!(map.contains("hole,zero"), "zeroes were written as holes: {map}");
    let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(folder.path().join("disk.raw")).unwrap());
    assert!(blocks * 512 < 10 * MIB, "the file is sparse, {blocks} sectors");
}

#[test]
fn qemu_img_sees_the_same_disk() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::new(file_device(folder.path(), 20 * MIB, true));
    let image = folder.path().join("image");
    let mut bytes = noise(4, 20 * MIB as usize);
    bytes[3 * MIB as usize..7 * MIB as usize].fill(0);
    std::fs::write(&image, &bytes).unwrap();
    let image = image.to_str().unwrap();
    let target = format!(
        "json:{{\"driver\":\"raw\",\"file\":{{\"driver\":\"nbd\",\"server\":{{\"type\":\"unix\",\"path\":\"{}\"}},\"export\":\"disk\"}}}}",
        server.socket.display()
    );
    succeed(QEMU, "qemu-img", &["convert", "-n", "-f", "raw", "-W", "-m", "16", image, &target]);
    let compared = succeed(QEMU, "qemu-img", &["compare", "-f", "raw", "-F", "raw", image, &target]);
    assert!(compared.contains("identical"), "{compared}");
    let info = succeed(QEMU, "qemu-img", &["info", &server.uri()]);
    assert!(info.contains("20971520 bytes"), "{info}");
    // A guest cannot be started on the file while it is exported.
    let raw = folder.path().join("disk.raw");
    let refused = run(QEMU, "qemu-io", &["-f", "raw", "-c", "write 0 512", raw.to_str().unwrap()]);
    assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("lock"));
}

#[test]
fn qemu_io_patterns_also_unaligned() {
    for direct in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let server = Server::new(file_device(folder.path(), 32 * MIB + 100, direct));
        let uri = server.uri();
        let mut args = vec!["-f", "raw"];
        let commands = [
            "write -P 0x11 0 1M",
            "write -P 0x22 1 5000",
            "read -P 0x11 0 1",
            "read -P 0x22 1 5000",
            "read -P 0x11 5001 1043575",
            "write -z 100 200",
            "read -P 0 100 200",
            "read -P 0x22 300 4701",
            "write -z -u 4096 64k",
            "read -P 0 4096 64k",
            "read -P 0x11 69632 10",
            "write -f -P 0x33 511 1026",
            "read -P 0x33 511 1026",
            "discard 512k 256k",
            "read -P 0 512k 256k",
            "read -P 0x11 786432 4096",
            "write -P 0x44 33554432 100",
            "read -P 0x44 33554432 100",
            "aio_write -P 0x55 2M 1M",
            "aio_write -P 0x66 4M 1M",
            "aio_write -z 6M 1M",
            "aio_flush",
            "read -P 0x55 2M 1M",
            "read -P 0x66 4M 1M",
            "read -P 0 6M 1M",
            "flush",
        ];
        args.extend(commands.iter().flat_map(|command| ["-c", command]));
        args.push(&uri);
        let output = succeed(QEMU, "qemu-io", &args);
        assert!(!output.contains("Pattern verification failed") && !output.contains("error"), "{output}");
    }
}

#[test]
fn fio_verifies_four_jobs_on_one_export() {
    for direct in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let server = Server::new(file_device(folder.path(), 64 * MIB, direct));
        let uri = format!("--uri={}", server.uri());
        // Four processes, each with its own connection and its own quarter of the disk.
        let output = succeed(
            "fio",
            "fio",
            &[
                "--name=verify",
                "--ioengine=nbd",
                &uri,
                "--numjobs=4",
                "--size=16m",
                "--offset_increment=16m",
                "--rw=randwrite",
                "--bsrange=512-64k",
                "--bs_unaligned",
                "--iodepth=16",
                "--verify=crc32c",
                "--verify_state_save=0",
                "--verify_fatal=1",
                "--fsync=64",
                "--randseed=7",
                "--group_reporting",
            ],
        );
        assert!(output.contains("err= 0"), "{output}");
    }
}
