//! Drills, with the real binary: beside a load and a failover, with scripts of every kind, killed at both ends, and out of space.
//!
//! Would catch: a drill that changes a point, another drill or the active copy, or that stops replication; a fork that outlives its drill; a result
//! that is lost or recorded for a script that was not run to its end.

mod support;

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use support::nbd::Nbd;
use support::node::{Node, Pair};
use support::views::each_point;
use support::{Process, Stop, eventually, need, noise, scratch, text};

const MIB: u64 = 1 << 20;
const DISK_BYTES: u64 = 32 * MIB;
const SOON: Duration = Duration::from_secs(30);

/// A pair with one disk full of noise, committed.
fn pair(folder: &Path) -> Pair {
    let pair = Pair::start(folder, "db", "50ms", &[("root", DISK_BYTES)]);
    let mut disk = Nbd::connect(&pair.sockets[0], "root").expect("the disk");
    for mib in 0..DISK_BYTES / MIB {
        disk.write(mib * MIB, &noise(mib, MIB as usize)).expect("a write");
    }
    pair.primary.settled("db");
    pair
}

fn newest(receiver: &Node) -> String {
    receiver.points("db").last().expect("a point").0.clone()
}

fn all_of(socket: &Path) -> Vec<u8> {
    let mut disk = Nbd::connect(socket, "root").expect("the export");
    let pieces = (0..disk.size / MIB).map(|mib| disk.read(mib * MIB, MIB as u32).expect("a read"));
    pieces.collect::<Vec<_>>().concat()
}

/// What there is of drills in the store.
fn forks(pair: &Pair) -> Vec<String> {
    let entries = std::fs::read_dir(pair.store.join("primary/db/forks")).expect("the forks");
    entries.map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned()).filter(|n| n.contains("drill")).collect()
}

fn drills(receiver: &Node) -> Vec<String> {
    let list = receiver.json(&["drill", "list"]);
    list["drills"].as_array().expect("a list").iter().map(|d| d["name"].as_str().expect("a name").to_owned()).collect()
}

fn script(folder: &Path, name: &str, body: &str) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).expect("a script");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("its mode");
    path
}

fn path(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[test]
fn two_drills_beside_the_load_and_a_failover() {
    let folder = scratch();
    let mut pair = pair(folder.path());
    let old = newest(&pair.receiver);
    let old_image = std::fs::read(&pair.images[0]).expect("the image");
    Nbd::connect(&pair.sockets[0], "root").expect("the disk").write(5 * MIB, &noise(77, MIB as usize)).expect("a write");
    pair.primary.settled("db");
    let new_image = std::fs::read(&pair.images[0]).expect("the image");
    let new = newest(&pair.receiver);
    let at = |name: &str| folder.path().join(format!("{name}.sock"));
    let begin = |name: &str, point: &str| {
        let export = format!("unix:{}", at(name).display());
        let begun = pair.receiver.json(&["drill", "db", "--name", name, "--point", point, "--export", &export]);
        assert_eq!((begun["point"].as_str(), begun["name"].as_str()), (Some(point), Some(format!("drill-{name}").as_str())));
    };
    begin("old", &old);
    begin("new", &new);
    let taken = pair.receiver.ask(&["drill", "db", "--export", &format!("unix:{}", at("old").display())]);
    assert!(!taken.status.success() && text(&taken).contains("serves a disk named root already"), "{}", text(&taken));

    let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    let (mut old_wanted, mut new_wanted) = (old_image.clone(), new_image.clone());
    let before = pair.receiver.copy("primary", "db")["points"].as_u64().expect("points");
    let highest_lag_ms = std::thread::scope(|scope| {
        let _stop = Stop(&stop);
        scope.spawn(|| {
            let mut disk = Nbd::connect(&pair.sockets[0], "root").expect("the disk");
            while !stop.load(Ordering::Relaxed) {
                let n = rounds.fetch_add(1, Ordering::Relaxed);
                disk.write(n * 7919 % (DISK_BYTES / 4096 - 16) * 4096, &noise(n, 65536)).expect("a write");
                // However slow the disk is, no epoch is all of it.
                if n % 32 == 31 {
                    pair.primary.committed("db");
                }
            }
        });
        let mut of_old = Nbd::connect(&at("old"), "root").expect("a drill");
        let mut of_new = Nbd::connect(&at("new"), "root").expect("a drill");
        let mut highest = 0;
        for n in 0..200_u64 {
            // Not in whole blocks: the rest of each comes from the point.
            let offset = n * 104_729 % (DISK_BYTES - 20_000);
            let change = |image: &mut Vec<u8>, content: &[u8]| {
                image[offset as usize..offset as usize + content.len()].copy_from_slice(content);
            };
            let (a, b) = (noise(1000 + n, 9_000), noise(2000 + n, 9_000));
            of_old.write(offset, &a).expect("a write to a drill");
            of_new.write(offset, &b).expect("a write to a drill");
            change(&mut old_wanted, &a);
            change(&mut new_wanted, &b);
            if n % 50 == 0 {
                of_old.flush().expect("a flush");
                highest = pair.primary.primary("db")["lag_ms"].as_u64().expect("a lag").max(highest);
            }
        }
        eventually("points come while both drills are written", SOON, || {
            (pair.receiver.copy("primary", "db")["points"].as_u64()? > before + 5).then_some(())
        });
        stop.store(true, Ordering::Relaxed);
        highest
    });
    println!("highest lag seen: {highest_lag_ms} ms, {} writes of the guest", rounds.load(Ordering::Relaxed));
    pair.primary.settled("db");
    assert!(all_of(&at("old")) == old_wanted, "the drill of {old} is its point and its own writes");
    assert!(all_of(&at("new")) == new_wanted, "the drill of {new} is its point and its own writes");
    let copy = pair.receiver.copy("primary", "db");
    let taken: Vec<u64> = copy["drills"].as_array().unwrap().iter().map(|d| d["space_used_bytes"].as_u64().unwrap()).collect();
    assert!(taken.len() == 2 && taken.iter().all(|bytes| (200 * 9_000..4 * MIB).contains(bytes)), "{copy:#}");
    println!("{}", pair.receiver.cli(&["drill", "list"]));

    // A failover does not mind them, nor they it.
    let image = std::fs::read(&pair.images[0]).expect("the image");
    pair.primary.kill();
    pair.receiver.failover("db", None, &at("copy"));
    assert!(all_of(&at("copy")) == image);
    Nbd::connect(&at("copy"), "root").expect("the copy").write(0, &noise(5, 4096)).expect("a write to the copy");
    let mixed = pair.receiver.ask(&["failover", "db", "--yes", "--export", &format!("unix:{}", at("old").display())]);
    assert!(!mixed.status.success() && text(&mixed).contains("choose another --export"), "{}", text(&mixed));
    assert!(all_of(&at("old")) == old_wanted && all_of(&at("new")) == new_wanted, "drills go on beside the active copy");
    pair.receiver.cli(&["drill", "end", "new"]);
    assert!(Nbd::connect(&at("new"), "root").is_err(), "an ended drill is served no more");
    assert_eq!((drills(&pair.receiver), forks(&pair)), (vec!["drill-old".to_owned()], vec!["drill-old".to_owned()]));
    pair.receiver.stop();
    assert_eq!(forks(&pair), Vec::<String>::new(), "a stop throws drills away");
    let mut seen = 0;
    each_point(
        &pair.store,
        "db",
        |info| [&old, &new].contains(&&info.point.to_string()),
        |info, disks| {
            let wanted = if info.point.to_string() == old { &old_image } else { &new_image };
            for mib in 0..DISK_BYTES / MIB {
                let range = (mib * MIB) as usize..((mib + 1) * MIB) as usize;
                assert!(disks[0].read(mib * MIB, MIB as usize) == wanted[range], "point {} in MiB {mib}", info.point);
            }
            seen += 1;
        },
    );
    assert_eq!(seen, 2);
}

#[test]
fn scripts_that_pass_fail_hang_and_print_megabytes() {
    need(&[("nbdcopy", "libnbd-bin")]);
    let folder = scratch();
    let pair = pair(folder.path());
    let image = pair.images[0].clone();
    let run = |name: &str, body: &str, more: &[&str]| {
        let script = script(folder.path(), name, body);
        let output = pair.receiver.ask(&[&["drill", "db", "--run", path(&script), "--json"], more].concat());
        assert_eq!((drills(&pair.receiver), forks(&pair)), (Vec::new(), Vec::new()), "{name}: the fork is thrown away");
        (output.status.success(), text(&output))
    };
    let same = format!(
        "set -e\nnbdcopy \"$TWINSITE_EXPORT\" - | cmp - {}\nnbdcopy - \"$TWINSITE_EXPORT_root\" < /dev/zero 2>/dev/null || true\n\
         test \"$TWINSITE_GROUP/$TWINSITE_DISKS\" = db/root\necho \"boots, as $TWINSITE_POINT\"",
        image.display()
    );
    let point = newest(&pair.receiver);
    let (passed, said) = run("pass.sh", &same, &[]);
    assert!(passed && said.contains(&format!("boots, as {point}")), "{said}");
    let copy = pair.receiver.copy("primary", "db");
    assert_eq!(
        (copy["verified"]["point"].as_str(), copy["verified"]["outcome"].as_str()),
        (Some(&*point), Some("passed")),
        "{copy:#}"
    );
    let marked = pair.receiver.json(&["points", "db"])["points"].as_array().unwrap().last().unwrap()["drill"].clone();
    assert_eq!(marked["remark"], format!("boots, as {point}"));
    assert!(pair.receiver.cli(&["points", "db"]).contains("verified 20"), "{}", pair.receiver.cli(&["points", "db"]));
    assert!(pair.receiver.cli(&["status"]).contains(&format!("point {point}, cut")));

    // A newer point, on which nothing passes.
    Nbd::connect(&pair.sockets[0], "root").expect("the disk").write(0, &noise(3, 4096)).expect("a write");
    pair.primary.settled("db");
    let (passed, said) = run("fail.sh", "echo 'no boot loader'; exit 7", &[]);
    assert!(!passed && said.contains("did not pass") && said.contains("exit code 7, no boot loader"), "{said}");
    let status = pair.receiver.cli(&["status"]);
    assert!(status.contains("the last one, of point") && status.contains("FAILED"), "{status}");
    let began = std::time::Instant::now();
    let (passed, said) = run("hang.sh", "sleep 600 & echo waits; sleep 600", &["--timeout", "5s"]);
    assert!(!passed && said.contains("too slow") && said.contains("did not end within 5.0 s; it last said: waits"), "{said}");
    assert!(began.elapsed() < SOON);
    let (passed, said) = run("loud.sh", "head -c 30000000 /dev/zero | tr '\\0' 'x'; echo; echo 'all printed'", &[]);
    assert!(passed && said.contains("all printed") && said.len() < 20_000, "{} bytes", said.len());
    let (passed, said) = run("killed.sh", "kill -9 $$", &[]);
    assert!(!passed && said.contains("killed by signal 9"), "{said}");
    let none = folder.path().join("no-mode");
    std::fs::write(&none, "").expect("a file");
    let refused = pair.receiver.ask(&["drill", "db", "--run", path(&none)]);
    assert!(refused.status.code() == Some(2) && text(&refused).contains("is not executable: run chmod +x"), "{}", text(&refused));
    let (passed, said) = run("no-shell.sh", "", &[]);
    assert!(passed, "{said}");
    let lost = folder.path().join("no-shell.sh");
    std::fs::write(&lost, "#!/nonexistent/shell\n").expect("a script without a shell");
    let failed = pair.receiver.ask(&["drill", "db", "--run", path(&lost)]);
    assert!(failed.status.code() == Some(1) && text(&failed).contains("cannot be run"), "{}", text(&failed));

    let results = pair.receiver.json(&["drill", "results", "db"]);
    let outcomes: Vec<&str> = results["results"].as_array().unwrap().iter().map(|r| r["outcome"].as_str().unwrap()).collect();
    assert_eq!(outcomes, ["passed", "failed", "timed-out", "passed", "killed", "passed", "not-run"]);
    let printed = pair.receiver.cli(&["drill", "results", "db", "--output"]);
    println!("{}", printed.lines().filter(|l| l.len() < 200).collect::<Vec<_>>().join("\n"));
    assert!(printed.contains("    no boot loader"));
}

/// Waits until the script, and what it started, that wrote its process id into a file do not run any more.
fn ended_with(started: &Path) {
    let pid = std::fs::read_to_string(started).expect("its pid");
    // An orphan that nobody has waited for yet is as good as gone.
    let state = |pid: &str| Some(std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?.rsplit_once(") ")?.1.to_owned());
    eventually("the script ends with whoever ran it", SOON, || {
        pid.split_whitespace().all(|pid| state(pid).is_none_or(|state| state.starts_with('Z'))).then_some(())
    });
}

/// A command line that is killed, one that is interrupted, a receiver that is killed.
#[test]
fn nothing_is_left_of_drills_that_are_cut_off() {
    let folder = scratch();
    let mut pair = pair(folder.path());
    let started = folder.path().join("started");
    let wait = script(folder.path(), "wait.sh", &format!("sleep 600 & echo $$ $! > {}; wait", started.display()));
    let begin = || {
        let _ = std::fs::remove_file(&started);
        let mut command = pair.receiver.command(&["drill", "db", "--run", path(&wait)]);
        let process = Process::start(command.stdout(Stdio::null()).stderr(Stdio::null()));
        eventually("the script runs", SOON, || std::fs::read_to_string(&started).ok().filter(|pid| pid.ends_with('\n')));
        // The name of the one before is free again only when all of it is gone.
        assert_eq!(drills(&pair.receiver).len(), 1);
        process
    };
    let gone = |receiver: &Node| {
        eventually("the fork is thrown away", SOON, || (drills(receiver).is_empty() && forks(&pair).is_empty()).then_some(()));
    };
    begin().kill();
    gone(&pair.receiver);
    ended_with(&started);
    let mut interrupted = begin();
    interrupted.signal(rustix::process::Signal::INT);
    let status = interrupted.ended(SOON);
    assert_eq!((status.code(), status.signal()), (Some(1), None), "it puts things in order first");
    gone(&pair.receiver);
    let results = pair.receiver.json(&["drill", "results", "db"]);
    assert_eq!(results["results"].as_array().unwrap().len(), 0, "an interrupted drill has no result: {results:#}");

    let mut cut_off = begin();
    let export = format!("unix:{}", folder.path().join("kept.sock").display());
    pair.receiver.cli(&["drill", "db", "--name", "kept", "--export", &export]);
    let mut kept = Nbd::connect(&folder.path().join("kept.sock"), "root").expect("a drill");
    kept.write(0, &noise(9, 65536)).expect("a write to a drill");
    assert_eq!(forks(&pair).len(), 2);
    pair.receiver.kill();
    let status = cut_off.ended(SOON);
    assert_eq!(status.code(), Some(1), "the command ends when its node is gone");
    assert_eq!(forks(&pair).len(), 2, "what a kill leaves");
    pair.receiver.start();
    assert_eq!((drills(&pair.receiver), forks(&pair)), (Vec::new(), Vec::new()));
    Nbd::connect(&pair.sockets[0], "root").expect("the disk").write(0, &noise(4, 4096)).expect("a write");
    pair.primary.settled("db");
    let image = std::fs::read(&pair.images[0]).expect("the image");
    pair.primary.kill();
    let socket = folder.path().join("copy.sock");
    pair.receiver.failover("db", None, &socket);
    assert!(all_of(&socket) == image, "the copy knows nothing of drills");
}

#[test]
fn a_drill_out_of_space_is_nobody_elses_affair() {
    let folder = scratch();
    let pair = pair(folder.path());
    let socket = folder.path().join("drill.sock");
    let export = format!("unix:{}", socket.display());
    let begun = pair.receiver.json(&["drill", "db", "--space", "1MiB", "--export", &export]);
    assert_eq!((begun["name"].as_str(), begun["space_max_bytes"].as_u64()), (Some("drill-1"), Some(MIB)));
    let mut disk = Nbd::connect(&socket, "root").expect("the drill");
    let written = noise(8, MIB as usize);
    disk.write(MIB, &written).expect("as much as it may");
    let refused = disk.write(8 * MIB, &noise(9, 4096)).expect_err("no more");
    assert_eq!(refused.raw_os_error(), Some(28), "ENOSPC: {refused}");
    disk.write(MIB, &written).expect("what has its space keeps it");
    assert!(disk.read(8 * MIB, MIB as u32).expect("a read") == noise(8, MIB as usize), "a refused write changes nothing");
    let copy = pair.receiver.copy("primary", "db");
    assert_eq!((copy["drills"][0]["refused_writes"].as_u64(), copy["state"].as_str()), (Some(1), Some("following")), "{copy:#}");
    assert!(pair.receiver.cli(&["status"]).contains("1 writes had no space"));
    Nbd::connect(&pair.sockets[0], "root").expect("the disk").write(0, &noise(4, 4096)).expect("a write of the guest");
    pair.primary.settled("db");
    let bad = pair.receiver.ask(&["drill", "db", "--point", "9.9", "--export", &format!("{export}2")]);
    assert!(!bad.status.success() && text(&bad).contains("no point 9.9"), "{}", text(&bad));
    let bad = pair.receiver.ask(&["drill", "end", "drill-7"]);
    assert!(text(&bad).contains("no drill 'drill-7' runs here: there are drill-1"), "{}", text(&bad));
    let bad = pair.receiver.ask(&["drill", "db"]);
    assert_eq!(bad.status.code(), Some(2), "{}", text(&bad));
}

/// The schedule does its drills by itself: one that passes, as another user, and one that does not.
#[test]
fn the_schedule_is_kept_and_a_failure_is_loud() {
    support::need_root();
    need(&[("nbdinfo", "libnbd-bin")]);
    let folder = scratch();
    let mut pair = pair(folder.path());
    let size =
        "nbdinfo --size \"$TWINSITE_EXPORT\" > /dev/null || exit 1; id -un; echo \"size is $(nbdinfo --size $TWINSITE_EXPORT)\"";
    let (good, bad) = (script(folder.path(), "good.sh", size), script(folder.path(), "bad.sh", "echo broken; exit 2"));
    let metrics = support::node::free_address();
    let config = std::fs::read_to_string(pair.receiver.config()).expect("the configuration");
    let config = config.replace("[node]\n", &format!("[node]\nmetrics = \"{metrics}\"\n"));
    let drill = |script: &Path, more: &str| {
        format!("\n[[drill]]\ngroup = \"db\"\nrun = \"{}\"\nevery = \"1h\"\n{more}", script.display())
    };
    pair.receiver.stop();
    std::fs::write(pair.receiver.config(), config.clone() + &drill(&good, "user = \"nobody\"\n")).expect("the configuration");
    pair.receiver.start();
    let found = eventually("the scheduled drill passes", SOON, || {
        let verified = pair.receiver.copy("primary", "db")["verified"].clone();
        (!verified.is_null()).then_some(verified)
    });
    assert_eq!((found["remark"].as_str(), found["scheduled"].as_bool()), (Some(&*format!("size is {DISK_BYTES}")), Some(true)));
    assert!(found["output"].as_str().unwrap().starts_with("nobody\n"), "{found:#}");
    eventually("the fork is thrown away", SOON, || (drills(&pair.receiver).is_empty() && forks(&pair).is_empty()).then_some(()));

    pair.receiver.stop();
    let both = config + &drill(&good, "user = \"nobody\"\n") + &drill(&bad, "");
    std::fs::write(pair.receiver.config(), both).expect("the configuration");
    pair.receiver.start();
    eventually("the other one fails", SOON, || {
        (pair.receiver.copy("primary", "db")["last_drill"]["outcome"] == "failed").then_some(())
    });
    let results = pair.receiver.json(&["drill", "results", "db"]);
    assert_eq!(results["results"].as_array().unwrap().len(), 2, "a restart repeats none: {results:#}");
    let status = pair.receiver.cli(&["status"]);
    assert!(status.contains("FAILED") && status.contains("exit code 2, broken"), "{status}");
    assert!(pair.receiver.log().contains("drill FAILED"), "{}", pair.receiver.log());
    let shown = {
        use std::io::{Read, Write};
        let mut stream = std::net::TcpStream::connect(&metrics).expect("metrics");
        stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").expect("a request");
        let mut shown = String::new();
        stream.read_to_string(&mut shown).expect("an answer");
        shown
    };
    let failed = "twinsite_receiver_last_drill_failed{client=\"primary\",group=\"db\"} 1";
    assert!(shown.contains(failed) && shown.contains("twinsite_receiver_verified_age_seconds{"), "{shown}");

    // A stop does not wait for a script, and does not judge by it.
    let pids = folder.path().join("pids");
    let hang = script(folder.path(), "hang.sh", &format!("sleep 600 & echo $$ $! > {}; wait", pids.display()));
    pair.receiver.stop();
    let config = std::fs::read_to_string(pair.receiver.config()).expect("the configuration") + &drill(&hang, "");
    std::fs::write(pair.receiver.config(), config).expect("the configuration");
    pair.receiver.start();
    let running = || std::fs::read_to_string(&pids).ok().filter(|pids| pids.ends_with('\n'));
    eventually("the third one runs", SOON, running);
    // Nor does it outlive a node that is killed.
    pair.receiver.kill();
    ended_with(&pids);
    std::fs::remove_file(&pids).expect("what it wrote");
    pair.receiver.start();
    eventually("the third one runs again", SOON, running);
    pair.receiver.stop();
    ended_with(&pids);
    assert_eq!(forks(&pair), Vec::<String>::new());
    pair.receiver.configure(&support::node::receiver_config(
        &support::node::free_address(),
        &pair.store,
        "primary",
        &pair.primary.key(),
    ));
    pair.receiver.start();
    let results = pair.receiver.json(&["drill", "results", "db"]);
    assert_eq!(results["results"].as_array().unwrap().len(), 2, "{results:#}");
}

/// Says something to the control socket; returns the whole answer.
fn told(receiver: &Node, path: &str, body: &str) -> String {
    use std::io::{Read, Write};
    let mut stream =
        std::os::unix::net::UnixStream::connect(receiver.folder.join("state/control.sock")).expect("the control socket");
    let head = format!("POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n");
    stream.write_all(format!("{head}content-length: {}\r\n\r\n{body}", body.len()).as_bytes()).expect("a request");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    answer
}

/// A drill at a private socket, under this name; what the node answered. Until the name is free if it is not.
fn begun(receiver: &Node, name: &str) -> serde_json::Value {
    let began = std::time::Instant::now();
    loop {
        let answer = told(receiver, "/v1/drill", &format!("{{\"group\":\"db\",\"name\":\"{name}\"}}"));
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
        if head.starts_with("HTTP/1.1 200") {
            return serde_json::from_str(body).expect("JSON");
        }
        assert!(head.starts_with("HTTP/1.1 409") && began.elapsed() < SOON, "{answer}");
    }
}

/// Would catch a request of somebody who is gone that comes late and holds, and so ends, the next drill of the name; and the end of a drill that takes
/// the folder, the server or the disks of the next one with it.
#[test]
fn the_next_drill_of_a_name_is_another_one() {
    let folder = scratch();
    let pair = pair(folder.path());
    let gone = begun(&pair.receiver, "drill-x");
    assert!(text(&pair.receiver.ask(&["drill", "end", "x"])).contains("drill-x: thrown away"));
    let mut current = begun(&pair.receiver, "drill-x");
    for path in ["/v1/drill/hold", "/v1/drill/end"] {
        let late = told(&pair.receiver, path, &format!("{{\"name\":\"drill-x\",\"serial\":{}}}", gone["serial"]));
        assert!(late.starts_with("HTTP/1.1 404"), "{path}: {late}");
    }
    for _ in 0..20 {
        let socket = PathBuf::from(current["export"].as_str().and_then(|at| at.strip_prefix("unix:")).expect("a socket"));
        let mut disk = Nbd::connect(&socket, "root").expect("the drill's disk");
        disk.read(0, 4096).expect("a read");
        let end = format!("{{\"name\":\"drill-x\",\"serial\":{}}}", current["serial"]);
        current = std::thread::scope(|scope| {
            let ending = scope.spawn(|| told(&pair.receiver, "/v1/drill/end", &end));
            // While it ends, with a client.
            let next = begun(&pair.receiver, "drill-x");
            let ended = ending.join().expect("a thread");
            assert!(ended.starts_with("HTTP/1.1 200"), "{ended}");
            next
        });
    }
    pair.receiver.cli(&["drill", "end", "drill-x"]);
    assert_eq!((drills(&pair.receiver), forks(&pair)), (Vec::new(), Vec::new()));
}

/// Would catch drills without a limit, and one at a private socket that stays although whoever asked for it never came.
#[test]
fn drills_are_bounded_and_one_that_nobody_holds_ends() {
    let folder = scratch();
    let pair = pair(folder.path());
    let answer = told(&pair.receiver, "/v1/drill", "{\"group\":\"db\",\"script\":\"x\"}");
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("drill-1"), "{answer}");
    let private = pair.receiver.folder.join("state/drills/drill-1");
    assert_eq!(std::fs::metadata(&private).expect("its folder").permissions().mode() & 0o777, 0o700);
    assert_eq!(std::fs::metadata(private.join("nbd.sock")).expect("its socket").permissions().mode() & 0o777, 0o600);
    let report =
        "{\"name\":\"drill-9\",\"report\":{\"outcome\":{\"outcome\":\"passed\"},\"took_ms\":1,\"remark\":\"\",\"output\":\"\"}}";
    let unknown = told(&pair.receiver, "/v1/drill/end", report);
    assert!(unknown.starts_with("HTTP/1.1 404") && unknown.contains("no drill 'drill-9' runs here"), "{unknown}");
    let begin = |n: usize| {
        let export = format!("unix:{}", folder.path().join(format!("{n}.sock")).display());
        pair.receiver.ask(&["drill", "db", "--name", &format!("n{n}"), "--export", &export])
    };
    for n in 2..=16 {
        let output = begin(n);
        assert!(output.status.success(), "{}", text(&output));
    }
    let one_more = text(&begin(17));
    // Unless the first one has ended by now.
    assert!(one_more.contains("16 drills run here, and no more may") || drills(&pair.receiver).len() == 16, "{one_more}");
    eventually("the one that nobody holds ends", SOON, || {
        (!drills(&pair.receiver).contains(&"drill-1".to_owned()) && !private.exists()).then_some(())
    });
    let names = drills(&pair.receiver);
    let mut args = vec!["drill", "end"];
    args.extend(names.iter().map(String::as_str));
    pair.receiver.cli(&args);
    assert_eq!((drills(&pair.receiver), forks(&pair)), (Vec::new(), Vec::new()));
}
