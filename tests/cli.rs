//! The command line against running nodes: what an administrator types, end to end, and every refusal in one line.
//!
//! Would catch: output that does not name what it should, a failover that asks nothing or changes something when refused, an
//! active copy that is gone after a restart, a bad group that takes the others down, a stop that does not commit.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;
mod support;

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Output;
use std::time::{Duration, Instant};

use common::{KEY_A, twinsite};
use rustix::process::Signal;
use support::nbd::{Nbd, is_lost};
use support::node::{Node, Pair, free_address, group_config, receiver_config};
use support::{Process, eventually, need, noise, run, scratch, sparse, text};

const MIB: u64 = 1 << 20;

/// What a command said on standard error: one line, and with this exit code.
#[track_caller]
fn refusal(output: &Output, code: i32) -> String {
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    assert_eq!(output.status.code(), Some(code), "{}", text(output));
    assert_eq!(said.lines().count(), 1, "one line: {said}");
    said
}

fn uri(socket: &Path, disk: &str) -> String {
    format!("nbd+unix:///{disk}?socket={}", socket.display())
}

#[test]
fn a_disk_is_protected_lost_and_served_from_the_copy() {
    need(&[("nbdcopy", "libnbd-bin"), ("qemu-io", "qemu-utils")]);
    let folder = scratch();
    let mut pair = Pair::start(folder.path(), "db", "100ms", &[("root", 16 * MIB), ("data", 8 * MIB)]);
    // The empty disks are a point of their own, so that there is an earlier one.
    pair.primary.committed("db");
    let (image, noise_file) = (pair.images[0].clone(), folder.path().join("noise"));
    std::fs::write(&noise_file, noise(1, 16 * MIB as usize)).unwrap();
    run("nbdcopy", &[noise_file.to_str().unwrap(), &uri(&pair.sockets[0], "root")]);
    let written = ["write -P 0x5a 1M 2M", "write -z 4M 1M", "discard 6M 64k", "flush"];
    for command in written {
        run("qemu-io", &["-f", "raw", "-c", command, &uri(&pair.sockets[1], "data")]);
    }
    pair.primary.committed("db");

    let status = pair.primary.cli(&["status"]);
    for part in
        ["group db, primary, to 127.0.0.1:", "state       streaming", "lag ", "dirty       0 B", "saved ", "in flight", "queue "]
    {
        assert!(status.contains(part), "{part:?} is not in\n{status}");
    }
    assert!(!status.contains('\x1b'), "no colour without a terminal");
    let status = pair.receiver.cli(&["status"]);
    for part in ["group primary/db, copy", "state       following 127.0.0.1:", "disk        data  8.0 MiB", "points "] {
        assert!(status.contains(part), "{part:?} is not in\n{status}");
    }
    let points = pair.receiver.cli(&["points", "db"]);
    assert!(points.starts_with("POINT") && points.lines().nth(1).unwrap().starts_with("1."), "{points}");

    let said = refusal(&pair.receiver.ask(&["points", "nonesuch"]), 1);
    assert_eq!(said, "unknown group 'nonesuch': known here are primary/db");
    let said = refusal(&pair.primary.ask(&["status", "nonesuch"]), 1);
    assert_eq!(said, "unknown group 'nonesuch': known here are db");
    let said = refusal(&pair.primary.ask(&["points", "db"]), 1);
    assert_eq!(said, "this node keeps no copies: it has no [receiver] section; ask the node at the other site");
    let copy = folder.path().join("copy.sock");
    let export = format!("unix:{}", copy.display());
    let said = refusal(&pair.receiver.ask(&["failover", "db", "--export", &export, "--point", "7.7", "--yes"]), 1);
    assert!(said.starts_with("group primary/db has no point 7.7: it has "), "{said}");
    let said = refusal(&pair.receiver.ask(&["failover", "db", "--export", "copy.sock", "--yes"]), 2);
    assert!(said.starts_with("--export 'copy.sock' is not an export address"), "{said}");

    // Without a terminal and without --yes: it tells and changes nothing.
    let asked = pair.receiver.ask(&["failover", "db", "--export", &export, "--force"]);
    let told = text(&asked);
    assert_eq!(asked.status.code(), Some(2), "{told}");
    for part in ["(the newest)", "1 is raised to 2", "to move     0 B", "WARNING     the primary", "nothing was changed", "--yes"]
    {
        assert!(told.contains(part), "{part:?} is not in\n{told}");
    }
    assert_eq!(pair.receiver.copy("primary", "db")["state"], "following");

    pair.primary.kill();
    let point = pair.receiver.failover("db", None, &copy);
    let (root, data) = (folder.path().join("root.out"), folder.path().join("data.out"));
    run("nbdcopy", &[&uri(&copy, "root"), root.to_str().unwrap()]);
    run("nbdcopy", &[&uri(&copy, "data"), data.to_str().unwrap()]);
    assert!(std::fs::read(&root).unwrap() == std::fs::read(&image).unwrap(), "root differs");
    assert!(std::fs::read(&data).unwrap() == std::fs::read(&pair.images[1]).unwrap(), "data differs");
    run("qemu-io", &["-f", "raw", "-c", "write -P 0x77 0 64k", "-c", "flush", &uri(&copy, "data")]);

    // Again, at another address; another point is refused.
    let (moved, earlier) = (folder.path().join("moved.sock"), pair.receiver.points("db")[0].0.clone());
    let to = format!("unix:{}", moved.display());
    assert_ne!(earlier, point);
    let said = refusal(&pair.receiver.ask(&["failover", "db", "--export", &to, "--point", &earlier, "--yes"]), 1);
    assert!(said.contains("is active already, from point"), "{said}");
    assert_eq!(pair.receiver.failover("db", None, &moved), point);
    assert!(!copy.exists(), "the old address is closed");

    // After a restart it is served where it was served last, with what was written to it.
    pair.receiver.stop();
    assert!(!moved.exists());
    pair.receiver.start();
    run("qemu-io", &["-f", "raw", "-c", "read -P 0x77 0 64k", "-c", "read -P 0x5a 1M 2M", &uri(&moved, "data")]);
    assert!(pair.receiver.cli(&["status"]).contains(&format!("active from point {point}")));

    // The old primary comes back: it is told, and its guest can still read its disk.
    pair.primary.start();
    eventually("the old primary is fenced", Duration::from_secs(20), || {
        (pair.primary.primary("db")["state"] == "fenced").then_some(())
    });
    let status = pair.primary.cli(&["status"]);
    assert!(status.contains("fenced: another side may write now"), "{status}");
    run("qemu-io", &["-f", "raw", "-c", "read -P 0x5a 1M 2M", &uri(&pair.sockets[1], "data")]);
}

#[test]
fn an_older_point_is_served_and_an_export_that_fails_is_shown() {
    let folder = scratch();
    let mut pair = Pair::start(folder.path(), "db", "100ms", &[("root", 4 * MIB)]);
    let mut nbd = Nbd::connect(&pair.sockets[0], "root").unwrap();
    nbd.write(MIB, &noise(21, 4096)).unwrap();
    pair.primary.committed("db");
    let older = pair.receiver.points("db").last().unwrap().0.clone();
    nbd.write(MIB, &noise(22, 4096)).unwrap();
    pair.primary.committed("db");
    assert_ne!(pair.receiver.points("db").last().unwrap().0, older);
    pair.primary.kill();
    let copy = folder.path().join("copy.sock");
    assert_eq!(pair.receiver.failover("db", Some(&older), &copy), older);
    assert!(Nbd::connect(&copy, "root").unwrap().read(MIB, 4096).unwrap() == noise(21, 4096), "not the older content");

    // Its address is taken when the node comes back: shown, and served elsewhere on demand.
    pair.receiver.stop();
    std::fs::write(&copy, "not a socket").unwrap();
    pair.receiver.start();
    let shown = pair.receiver.copy("primary", "db");
    assert!(shown["state"] == "active" && shown["active"]["export"].is_null(), "{shown:#}");
    assert!(shown["error"].as_str().unwrap().starts_with("not exported: "), "{shown:#}");
    assert!(pair.receiver.cli(&["status"]).contains("copy.sock: exists and is not a socket"));
    let other = folder.path().join("other.sock");
    assert_eq!(pair.receiver.failover("db", None, &other), older);
    let shown = pair.receiver.copy("primary", "db");
    assert_eq!(shown["active"]["export"], format!("unix:{}", other.display()), "{shown:#}");
    assert!(Nbd::connect(&other, "root").unwrap().read(MIB, 4096).unwrap() == noise(21, 4096), "not the older content");
}

#[test]
fn a_failover_to_an_export_that_is_taken_changes_nothing() {
    let folder = scratch();
    let mut pair = Pair::start(folder.path(), "db", "100ms", &[("root", 4 * MIB)]);
    pair.primary.stop();
    let config = std::fs::read_to_string(pair.primary.config()).unwrap();
    let group = &config[config.find("[[group]]").unwrap()..];
    let second = group.replace("\"db\"", "\"web\"").replace("root.raw", "web.raw").replace("root.sock", "web.sock");
    sparse(&pair.primary.folder.join("web.raw"), 4 * MIB);
    std::fs::write(pair.primary.config(), format!("{config}{second}")).unwrap();
    pair.primary.start();
    pair.primary.committed("db");
    pair.primary.committed("web");

    let tcp = format!("tcp:{}", free_address());
    pair.receiver.cli(&["failover", "db", "--export", &tcp, "--yes", "--force"]);
    let records = std::fs::read(pair.receiver.folder.join("state/exports.json")).unwrap();
    let said = refusal(&pair.receiver.ask(&["failover", "web", "--export", &tcp, "--yes", "--force"]), 1);
    assert!(said.starts_with(&format!("{tcp} serves a disk named root already, of group primary/db")), "{said}");
    let web = pair.receiver.copy("primary", "web");
    assert!(web["state"] == "following" && web["generation"] == 1 && web["active"].is_null(), "{web:#}");
    assert_eq!(std::fs::read(pair.receiver.folder.join("state/exports.json")).unwrap(), records);

    // Replication goes on, and the other group's copy is served where it was.
    let before = pair.receiver.points("web").len();
    Nbd::connect(&pair.primary.folder.join("web.sock"), "root").unwrap().write(0, &noise(23, 4096)).unwrap();
    pair.primary.committed("web");
    assert!(pair.receiver.points("web").len() > before);
    assert_eq!(pair.receiver.copy("primary", "db")["active"]["export"], tcp);
}

#[test]
fn an_orderly_stop_commits_what_was_written() {
    let folder = scratch();
    // So long an interval that nothing but the stop commits the write.
    let mut pair = Pair::start(folder.path(), "db", "1h", &[("root", 4 * MIB)]);
    eventually("the first sync", Duration::from_secs(30), || (!pair.primary.primary("db")["committed"].is_null()).then_some(()));
    let mut nbd = Nbd::connect(&pair.sockets[0], "root").unwrap();
    nbd.write(MIB, &noise(3, 4096)).unwrap();
    drop(nbd);
    pair.primary.stop();
    assert!(pair.primary.log().contains("everything is committed"), "{}", pair.primary.log());
    let copy = folder.path().join("copy.sock");
    pair.receiver.failover("db", None, &copy);
    assert_eq!(Nbd::connect(&copy, "root").unwrap().read(MIB, 4096).unwrap(), noise(3, 4096));
}

#[test]
fn check_names_what_is_damaged() {
    let folder = scratch();
    let mut pair = Pair::start(folder.path(), "db", "100ms", &[("root", 4 * MIB)]);
    Nbd::connect(&pair.sockets[0], "root").unwrap().write(0, &noise(8, MIB as usize)).unwrap();
    pair.primary.committed("db");
    pair.primary.stop();
    let store = pair.store.to_str().unwrap().to_owned();
    let said = refusal(&pair.receiver.ask(&["check", &store]), 1);
    assert!(said.contains("belongs to a running node"), "{said}");
    pair.receiver.stop();
    let good = pair.receiver.cli(&["check", &store]);
    assert!(good.starts_with("primary/db: good: ") && good.contains(" frames, "), "{good}");

    let segment = pair.store.join("primary/db/journal/0000000001.seg");
    let mut bytes = std::fs::read(&segment).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&segment, bytes).unwrap();
    let damaged = pair.receiver.ask(&["check", &store]);
    let said = text(&damaged);
    assert_eq!(damaged.status.code(), Some(1), "{said}");
    assert!(said.contains("0000000001.seg: at offset ") && said.contains("nothing was changed"), "{said}");
    let said = refusal(&pair.receiver.ask(&["check", "/nonexistent/store"]), 1);
    assert!(said.contains("/nonexistent/store"), "{said}");
    assert!(!Path::new("/nonexistent").exists());
}

#[test]
fn a_bad_group_leaves_the_others_running() {
    let folder = scratch();
    let mut node = Node::new(folder.path(), "node");
    let (good, socket, other) = (folder.path().join("good.raw"), folder.path().join("good.sock"), folder.path().join("bad.sock"));
    sparse(&good, MIB);
    let peer = free_address();
    let bad = group_config("bad", &peer, KEY_A, "1s", &[("root", Path::new("/nonexistent/disk.raw"), &other)]);
    let text = bad + &group_config("good", &peer, KEY_A, "1s", &[("root", &good, &socket)]);
    node.key();
    node.configure(&text);
    node.start();
    let status = node.cli(&["status"]);
    assert!(status.contains("not started: disk root: /nonexistent/disk.raw: cannot open"), "{status}");
    let line = "group not started: disk root: /nonexistent/disk.raw: cannot open: No such file";
    assert!(node.log().lines().filter(|l| l.contains(line)).count() == 1, "{}", node.log());
    // No receiver answers either: the guest does not notice.
    let mut nbd = Nbd::connect(&socket, "root").unwrap();
    nbd.write(0, &noise(4, 4096)).unwrap();
    nbd.flush().unwrap();
    assert_eq!(nbd.read(0, 4096).unwrap(), noise(4, 4096));
    assert!(!other.exists());
}

/// A guest's QEMU tries again all the time while its node starts: it must find no node, or its disk.
#[test]
fn a_guest_that_connects_while_the_node_starts_waits_for_its_disk() {
    let folder = scratch();
    let mut pair = Pair::start(folder.path(), "db", "100ms", &[("root", MIB), ("data", MIB)]);
    for _ in 0..5 {
        pair.primary.kill();
        let socket = pair.sockets[1].clone();
        let guest = std::thread::spawn(move || {
            loop {
                match Nbd::connect(&socket, "data") {
                    Ok(mut nbd) => return nbd.write(0, &noise(9, 4096)),
                    Err(error) if is_lost(&error) => {}
                    Err(error) => return Err(error),
                }
            }
        });
        pair.primary.start();
        guest.join().unwrap().unwrap();
    }
}

#[test]
fn a_second_signal_stops_at_once() {
    let folder = scratch();
    // So long an interval that only the stop has something to commit; and a receiver that hangs just then.
    let mut pair = Pair::start(folder.path(), "db", "1h", &[("root", MIB)]);
    pair.primary.stop();
    let config = std::fs::read_to_string(pair.primary.config()).unwrap();
    std::fs::write(pair.primary.config(), config.replacen("[node]\n", "[node]\nstop_timeout = \"1h\"\n", 1)).unwrap();
    pair.primary.start();
    pair.primary.committed("db");
    send(pair.receiver.pid(), Signal::STOP);
    Nbd::connect(&pair.sockets[0], "root").unwrap().write(0, &noise(5, 4096)).unwrap();
    send(pair.primary.pid(), Signal::TERM);
    eventually("the export is closed", Duration::from_secs(20), || (!pair.sockets[0].exists()).then_some(()));
    assert!(!pair.primary.log().contains("stopped"), "it waits for the last commit:\n{}", pair.primary.log());
    send(pair.primary.pid(), Signal::TERM);
    let (success, log) = pair.primary.ended(Duration::from_secs(10));
    assert!(success && log.contains("stopped at once"), "{log}");
}

#[test]
fn readiness_metrics_and_files_are_as_documented() {
    let folder = scratch();
    let (notify, metrics) = (folder.path().join("notify"), free_address());
    let manager = UnixDatagram::bind(&notify).unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let node = Node::new(folder.path(), "node");
    node.key();
    node.configure(&receiver_config(&free_address(), &folder.path().join("store"), "alpha", KEY_A));
    let config = std::fs::read_to_string(node.config()).unwrap();
    std::fs::write(node.config(), config.replacen("[node]\n", &format!("[node]\nmetrics = \"{metrics}\"\n"), 1)).unwrap();
    let mut process = Process::start(node.command(&["run"]).env("NOTIFY_SOCKET", &notify));
    let mut message = [0; 64];
    let n = manager.recv(&mut message).unwrap();
    assert_eq!(&message[..n], b"READY=1");

    let mode = |name: &str| std::fs::metadata(node.folder.join("state").join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(""), mode("node.key"), mode("control.sock")), (0o700, 0o600, 0o600));
    let page = scrape(&metrics, "/metrics");
    assert!(page.starts_with("HTTP/1.1 200 OK") && page.contains("\ntwinsite_receiver_up 1\n"), "{page}");
    assert!(scrape(&metrics, "/").starts_with("HTTP/1.1 404"));

    // A second node with this state folder is refused, whatever it listens on.
    let said = refusal(&node.ask(&["run"]), 1);
    assert!(said.contains("a node already runs with this state folder"), "{said}");
    process.signal(Signal::INT);
    assert!(process.ended(Duration::from_secs(20)).success());
    let n = manager.recv(&mut message).unwrap();
    assert_eq!(&message[..n], b"STOPPING=1");
    let said = refusal(&node.ask(&["status"]), 1);
    assert!(said.contains("control.sock: no node answers here: start it with twinsite run"), "{said}");
}

#[test]
fn identity_is_made_once_and_printed_ready_to_paste() {
    let folder = scratch();
    let node = Node::new(folder.path(), "alpha");
    node.configure("");
    let config = std::fs::read_to_string(node.config()).unwrap().replacen("[node]\n", "[node]\nname = \"alpha\"\n", 1);
    std::fs::write(node.config(), config).unwrap();
    let key = node.key();
    let printed = node.cli(&["id"]);
    assert!(printed.starts_with(&format!("name  alpha\nkey   {key}\n")), "{printed}");
    assert!(printed.contains(&format!("[[receiver.client]]\nname = \"alpha\"\nkey = \"{key}\"\n")), "{printed}");
    assert!(printed.contains(&format!("peer = \"alpha:7447\"\npeer_key = \"{key}\"\n")), "{printed}");
    let path = node.folder.join("state/node.key");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    let said = refusal(&node.ask(&["id"]), 1);
    assert!(said.contains("node.key: mode 0644 lets other users in: run chmod 0600"), "{said}");
}

#[test]
fn every_command_has_help_with_examples_and_usage_is_2() {
    for command in ["run", "id", "status", "points", "failover", "check", "demo", "completion"] {
        let help = twinsite().args([command, "--help"]).output().unwrap();
        assert!(help.status.success() && text(&help).contains("Examples:\n  twinsite "), "{command}: {}", text(&help));
    }
    for wrong in [
        &["nonesuch"][..],
        &["points"],
        &["failover", "db"],
        &["failover", "db", "--export", "unix:x", "--point", "neither a point nor a name"],
        &["status", "--bogus"],
    ] {
        assert_eq!(twinsite().args(wrong).output().unwrap().status.code(), Some(2), "{wrong:?}");
    }
    let script = twinsite().args(["completion", "bash"]).output().unwrap();
    assert!(script.status.success() && text(&script).contains("failover"));
}

#[test]
fn the_demo_verifies() {
    let folder = scratch();
    let image = folder.path().join("image.raw");
    let mut content = noise(7, 3 * MIB as usize);
    content.resize(9 * MIB as usize + 512, 0);
    std::fs::write(&image, &content).unwrap();
    let out = twinsite()
        .args(["demo", "--seconds", "3", "--interval", "100ms", "--json", "--disk"])
        .arg(&image)
        .arg("--dir")
        .arg(folder.path())
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", text(&out));
    let report: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(report["verified"], true, "{report:#}");
    assert_eq!(report["disk_bytes"], 9 * MIB + 512);
    assert!(report["writes_acknowledged_before_cut"].as_u64() > Some(100), "{report:#}");
    assert!(std::fs::read(&image).unwrap() == content, "the image itself is never touched");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "no files are left behind");
}

fn send(pid: u32, signal: Signal) {
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

fn scrape(address: &str, path: &str) -> String {
    let until = Instant::now() + Duration::from_secs(20);
    let mut stream = loop {
        match std::net::TcpStream::connect(address) {
            Ok(stream) => break stream,
            Err(error) => assert!(Instant::now() < until, "{address}: {error}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).unwrap();
    page
}
