//! Images that are carried over by hand, with the real binary.
//!
//! Would catch: a copy that can be activated before it was compared, a difference that is not found, a first sync that sends all the same, half an
//! image that is taken for a whole one after a kill.

mod support;

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use support::nbd::Nbd;
use support::site::Site;
use support::{Process, eventually, need, noise, run, text};

const MIB: u64 = 1 << 20;
const SOON: Duration = Duration::from_secs(30);

fn path(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn fill(image: &Path, mib: u64) {
    let file = std::fs::File::options().write(true).open(image).expect("the image");
    for n in 0..mib {
        // A quarter of it are holes.
        if n % 4 != 3 {
            file.write_all_at(&noise(n, MIB as usize), n * MIB).expect("a write");
        }
    }
}

#[test]
fn an_adopted_image_is_compared_and_only_differences_are_sent() {
    need(&[("qemu-img", "qemu-utils")]);
    let mut site = Site::new();
    let image = site.image("data.raw", 64 * MIB);
    fill(&image, 64);
    let carried = site.folder.path().join("carried.raw");
    run("cp", &[path(&image), path(&carried)]);
    // The server ran on: blocks are new, gone, and written where there was nothing.
    let file = std::fs::File::options().write(true).open(&image).expect("the image");
    for n in 0..40 {
        file.write_all_at(&noise(900 + n, 4096), n * 1_572_864 / 4096 * 4096).expect("a write");
    }
    file.write_all_at(&vec![0; MIB as usize], 20 * MIB).expect("zeroes");
    site.receiver.start();

    let qcow2 = site.folder.path().join("carried.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", path(&qcow2), "64M"]);
    let refused = site.receiver.ask(&["adopt", "db", "--disk", "data", "--from", path(&qcow2)]);
    assert!(!refused.status.success() && text(&refused).contains("qemu-img convert -O raw"), "{}", text(&refused));
    let refused = site.receiver.ask(&["adopt", "stranger/db", "--disk", "data", "--from", path(&carried)]);
    assert!(text(&refused).contains("write CLIENT/GROUP, with one of primary"), "{}", text(&refused));
    let refused = site.receiver.ask(&["adopt", "db", "--disk", "data", "--from", "/nowhere.raw"]);
    assert!(text(&refused).contains("/nowhere.raw: cannot read the image"), "{}", text(&refused));
    println!("{}", site.receiver.cli(&["adopt", "db", "--disk", "data", "--from", path(&carried)]));
    let again = site.receiver.ask(&["adopt", "primary/db", "--disk", "data", "--from", path(&carried)]);
    assert!(!again.status.success() && text(&again).contains("is here already"), "{}", text(&again));

    // Nothing shows it before it was compared, also after a restart.
    let socket = site.folder.path().join("copy.sock");
    let export = format!("unix:{}", socket.display());
    let to = site.folder.path().join("out.raw");
    for _ in 0..2 {
        let copy = site.receiver.copy("primary", "db");
        assert_eq!((copy["points"].as_u64(), copy["committed"].is_null()), (Some(0), true), "{copy:#}");
        for args in [
            &["failover", "db", "--yes", "--export", &export] as &[&str],
            &["failover", "db", "--yes", "--export", &export, "--point", "1.0"],
            &["drill", "db", "--export", &export],
            &["drill", "db", "--export", &export, "--point", "1.0"],
            &["export", "db", "--to", path(&to)],
            &["export", "db", "--to", path(&to), "--point", "1.0"],
        ] {
            let output = site.receiver.ask(args);
            assert!(!output.status.success(), "twinsite {args:?}: {}", text(&output));
            assert!(
                text(&output).contains("no committed point yet") || text(&output).contains("no point 1.0"),
                "{}",
                text(&output)
            );
        }
        site.receiver.stop();
        site.receiver.start();
    }

    let group = site.group("db", &image);
    site.primary.configure(&group);
    site.primary.start();
    let status = site.primary.committed("db");
    let (sent, compared) = (status["sent_bytes"].as_u64().expect("bytes"), status["compared_bytes"].as_u64().expect("bytes"));
    println!("sent {sent} bytes, compared {compared}, differed {}", status["differing_bytes"]);
    assert!(compared >= 64 * MIB, "{status:#}");
    assert!(sent < 4 * MIB && status["differing_bytes"].as_u64().expect("bytes") < 4 * MIB, "{status:#}");
    assert_eq!(site.receiver.points("db").len(), 1);
    site.goes_on("db", 5);
    assert!(std::fs::read(&carried).expect("the carried image").len() as u64 == 64 * MIB, "the image stays as it is");
    site.copy_equals("db", &image);
    assert!(Nbd::connect(&site.folder.path().join("db-copy.sock"), "data").is_ok());
}

#[test]
fn a_kill_leaves_nothing_of_an_image_and_it_can_be_adopted_again() {
    let mut site = Site::new();
    let image = site.image("data.raw", 1024 * MIB);
    fill(&image, 1024);
    site.receiver.start();
    let aside = site.store.join("primary/.adopt-db");
    let args = ["adopt", "db", "--disk", "data", "--from", path(&image)];
    let mut adopting = Process::start(site.receiver.command(&args).stdout(Stdio::null()).stderr(Stdio::null()));
    eventually("the image is copied", SOON, || aside.join("base/data.raw").exists().then_some(()));
    site.receiver.kill();
    assert!(!adopting.ended(SOON).success());
    assert!(aside.exists(), "what a kill leaves; if it was whole by then the test is too slow");
    site.receiver.start();
    assert!(!aside.exists(), "a start removes it");
    assert!(site.receiver.copy("primary", "db").is_null());

    // Stopped in order, in the middle of it.
    let mut adopting = Process::start(site.receiver.command(&args).stdout(Stdio::null()).stderr(Stdio::null()));
    eventually("the image is copied", SOON, || aside.join("base/data.raw").exists().then_some(()));
    site.receiver.stop();
    assert!(!adopting.ended(SOON).success());
    assert!(!aside.exists(), "a stop leaves nothing");
    site.receiver.start();
    let told = site.receiver.json(&args);
    assert_eq!((told["done_bytes"].as_u64(), told["error"].is_null()), (Some(1024 * MIB), true), "{told:#}");
    let group = site.group("db", &image);
    site.primary.configure(&group);
    site.primary.start();
    site.primary.compared("db");
    let status = site.primary.committed("db");
    assert_eq!(status["differing_bytes"], 0, "{status:#}");
    assert!(status["sent_bytes"].as_u64().expect("bytes") < MIB, "{status:#}");
    site.copy_equals("db", &image);
}

/// A bit flips in the base under a running receiver: `verify` finds it although nobody has read it, the primary sends it again, and the copy is whole
/// again, also after a restart; `check` goes on to name the block in the base.
#[test]
fn a_bit_that_flips_in_the_base_is_found_and_sent_again() {
    let mut site = Site::new();
    let image = site.image("data.raw", 16 * MIB);
    fill(&image, 16);
    site.receiver.start();
    site.receiver.cli(&["adopt", "db", "--disk", "data", "--from", path(&image)]);
    site.primary.configure(&site.group("db", &image));
    site.primary.start();
    site.primary.committed("db");
    let verify = || {
        let output = site.primary.ask(&["verify", "db", "--json"]);
        let report: serde_json::Value =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", text(&output)));
        assert_eq!(output.status.success(), report["differing_bytes"] == 0, "{}", text(&output));
        report["differing_bytes"].as_u64().expect("bytes")
    };
    assert_eq!(verify(), 0);
    let base = site.store.join("primary/db/base/data.raw");
    let file = std::fs::File::options().read(true).write(true).open(&base).expect("the base");
    let (byte, mut content) = (5 * MIB + 4096 * 3 + 77, [0]);
    file.read_exact_at(&mut content, byte).expect("a byte");
    file.write_all_at(&[content[0] ^ 0x20], byte).expect("a byte");
    let told = format!("{}: the block at offset {} is damaged", base.display(), 5 * MIB + 4096 * 3);
    // What is sent again is the range that was compared.
    let differing = verify();
    assert!(0 < differing && differing <= MIB, "{differing} bytes differ");
    site.primary.committed("db");
    assert!(site.receiver.log().contains(&told), "{told}: not in {}", site.receiver.log());
    let copy = site.receiver.copy("primary", "db");
    assert_eq!(copy["damaged_base_blocks"], 1, "{copy:#}");
    assert!(copy["last_damage"].as_str().expect("the damage").starts_with(&told), "{copy:#}");
    let status = site.receiver.cli(&["status"]);
    assert!(status.contains(&told) && status.contains("1 base block, the last"), "{status}");
    assert_eq!(verify(), 0);
    site.receiver.stop();
    let checked = site.receiver.ask(&["check", path(&site.store)]);
    let found = format!("{}: at offset {}: the block's checksum is", base.display(), 5 * MIB + 4096 * 3);
    assert!(checked.status.code() == Some(1) && text(&checked).contains(&found), "{found}: not in {}", text(&checked));
    site.receiver.start();
    eventually("it is back", SOON, || {
        let connected = site.receiver.copy("primary", "db")["peer"].is_string();
        (connected && site.primary.primary("db")["state"] == "streaming").then_some(())
    });
    assert_eq!(verify(), 0);
    site.copy_equals("db", &image);
}
