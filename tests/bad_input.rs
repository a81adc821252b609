//! What people and machines get wrong, end to end: each gets one clear line at both ends, loses nothing, and the other
//! groups go on. Broken frames, lengths and versions are fed to the decoders in `proto` and `receiver`.
//!
//! Would catch: a mistake that ends a whole node, a retry that never recovers, an error that only one end tells, a copy
//! that is touched by a session that should have been refused.

mod support;

use std::fs::OpenOptions;
use std::io::Write;
use std::process::Stdio;
use std::time::Duration;

use proto::control::Hello;
use proto::{CloseCode, Generation, Message};
use rustix::process::Signal;
use support::nbd::Nbd;
use support::node::{Node, free_address, group_config, receiver_config};
use support::peer::{FalsePrimary, FalseReceiver};
use support::site::{Site, small_tmpfs};
use support::{eventually, need, need_root, noise, one_at_a_time, run, scratch, sparse, text};

const MIB: u64 = 1 << 20;

#[test]
fn a_wrong_key_is_told_at_both_ends() {
    let mut site = Site::new();
    let (good, bad) = (site.image("good.raw", 8 * MIB), site.image("bad.raw", 8 * MIB));
    let wrong = site.group("bad", &bad).replace(&site.receiver_key, &site.primary.key());
    site.primary.configure(&(site.group("good", &good) + &wrong));
    site.receiver.start();
    site.primary.start();
    let error = site.error("bad");
    assert!(error.contains(&site.primary.key()), "it shows the key that was pinned: {error}");
    site.receiver_says(&["127.0.0.1", "it does not accept this node's key: compare its `peer_key`"]);
    site.goes_on("good", 1);
    site.copy_equals("good", &good);
}

#[test]
fn a_disk_of_another_size_is_refused_and_its_copy_kept() {
    let mut site = Site::new();
    let (image, other) = (site.image("image.raw", 8 * MIB), site.image("other.raw", 8 * MIB));
    site.primary.configure(&(site.group("db", &image) + &site.group("other", &other)));
    site.receiver.start();
    site.primary.start();
    site.goes_on("db", 1);
    site.primary.stop();
    let before = site.receiver.points("db");
    let resize = |bytes: u64| OpenOptions::new().write(true).open(&image).and_then(|f| f.set_len(bytes)).expect("a resize");
    resize(12 * MIB);
    site.primary.start();
    let error = site.error("db");
    assert!(error.contains(&(12 * MIB).to_string()) && error.contains(&(8 * MIB).to_string()), "both sizes: {error}");
    site.receiver_says(&["db", &(12 * MIB).to_string()]);
    site.goes_on("other", 2);
    assert_eq!(site.receiver.points("db"), before, "the refused session left the copy alone");
    site.primary.stop();
    resize(8 * MIB);
    site.primary.start();
    site.goes_on("db", 3);
    site.copy_equals("db", &image);
}

#[test]
fn a_full_store_stops_no_guest_and_recovers_when_there_is_space() {
    need_root();
    need(&[("mount", "mount"), ("umount", "mount")]);
    let _alone = one_at_a_time();
    let mut site = Site::new();
    let _space = small_tmpfs(&site.store, 24);
    let image = site.image("image.raw", 64 * MIB);
    site.primary.configure(&site.group("db", &image));
    site.receiver.start();
    site.primary.start();
    site.goes_on("db", 1);
    let before = site.receiver.points("db");
    for at in 0..40 {
        // Promise 5: the guest is served whatever happens at the other site.
        site.write("db", at * MIB, &noise(100 + at, MIB as usize));
    }
    let error = site.error("db");
    assert!(error.contains("space"), "{error}");
    site.receiver_says(&["db", "space"]);
    let kept = site.receiver.points("db");
    assert!(kept.starts_with(&before), "no committed point is given up");
    run("mount", &["-o", "remount,size=200m", site.store.to_str().expect("UTF-8")]);
    let status = site.primary.committed("db");
    assert!(status["error"].is_null(), "{status:#}");
    assert!(site.receiver.points("db").starts_with(&kept), "the points from before are still there");
    site.copy_equals("db", &image);
    site.receiver.stop();
    site.receiver.cli(&["check", site.store.to_str().expect("UTF-8")]);
}

/// The store is full, which is why the copy fell behind, and then the primary is lost.
#[test]
fn a_full_store_can_be_activated_once_it_has_a_little_space() {
    need_root();
    need(&[("mount", "mount"), ("umount", "mount")]);
    let _alone = one_at_a_time();
    let mut site = Site::new();
    let _space = small_tmpfs(&site.store, 8);
    let image = site.image("image.raw", 64 * MIB);
    site.primary.configure(&site.group("db", &image));
    site.receiver.start();
    site.primary.start();
    site.goes_on("db", 1);
    site.write("db", MIB, &noise(2, 20 * MIB as usize));
    site.error("db");
    site.primary.kill();
    // A cut in the middle of the writing may have made a point of what still fitted.
    let newest = site.receiver.points("db").pop().expect("a point").0;
    // What is left of the space is used up, so that a failover has none.
    let mut filler = std::fs::File::create(site.store.join(".filler")).expect("a file");
    let room = (0..4096).find(|_| filler.write_all(&[1; 4096]).is_err()).expect("a full store");
    println!("{} KiB were left", room * 4);
    let socket = site.folder.path().join("copy.sock");
    let export = format!("unix:{}", socket.display());
    let refused = site.receiver.ask(&["failover", "db", "--export", &export, "--yes", "--force", "--json"]);
    if !refused.status.success() {
        let said = text(&refused);
        println!("failover: {}", said.trim());
        assert!(said.contains("space") && said.trim().lines().count() == 1, "{said}");
        run("mount", &["-o", "remount,size=9m", site.store.to_str().expect("UTF-8")]);
        site.receiver.failover("db", None, &socket);
    }
    let active = site.receiver.copy("primary", "db");
    assert_eq!(active["active"]["point"], *newest, "{active:#}");
    let mut copy = Nbd::connect(&socket, "data").expect("the copy");
    let read = |copy: &mut Nbd| copy.read(0, MIB as u32).expect("a read");
    assert!(read(&mut copy) == noise(1, MIB as usize), "the committed data");
    // Its guest fills it again: an error for the guest, not for the copy.
    let full = (2..64).find_map(|at| copy.write(at * MIB, &noise(at, MIB as usize)).err()).expect("a full store");
    assert_eq!(full.raw_os_error(), Some(28), "ENOSPC reaches the guest: {full}");
    assert!(read(&mut copy) == noise(1, MIB as usize), "the committed data is still there");
    run("mount", &["-o", "remount,size=100m", site.store.to_str().expect("UTF-8")]);
    for at in 2..64 {
        copy.write(at * MIB, &noise(at, MIB as usize)).expect("a write, now that there is space");
    }
    copy.flush().expect("a flush");
}

#[test]
fn a_full_disk_at_the_primary_is_the_guests_error_alone() {
    need_root();
    need(&[("mount", "mount"), ("umount", "mount")]);
    let _alone = one_at_a_time();
    let mut site = Site::new();
    let small = site.folder.path().join("small");
    let _space = small_tmpfs(&small, 8);
    let image = small.join("image.raw");
    sparse(&image, 32 * MIB);
    let other = site.image("other.raw", 8 * MIB);
    site.primary.configure(&(site.group("db", &image) + &site.group("other", &other)));
    site.receiver.start();
    site.primary.start();
    let mut nbd = Nbd::connect(&site.socket("db"), "data").expect("the export");
    let refused = (0..32).find_map(|at| nbd.write(at * MIB, &noise(at, MIB as usize)).err()).expect("a full file system");
    assert_eq!(refused.raw_os_error(), Some(28), "ENOSPC reaches the guest: {refused}");
    // The connection and the group live on: what was written is replicated, also the part of the write that failed.
    nbd.write(0, &noise(99, MIB as usize)).expect("a write where there is space already");
    drop(nbd);
    site.goes_on("other", 1);
    let status = site.primary.committed("db");
    assert_eq!(status["state"], "streaming", "{status:#}");
    site.copy_equals("db", &image);
}

#[test]
fn a_store_that_belongs_to_a_running_node_is_refused() {
    let mut site = Site::new();
    let image = site.image("image.raw", 8 * MIB);
    site.primary.configure(&site.group("db", &image));
    site.receiver.start();
    site.primary.start();
    site.goes_on("db", 1);
    let pid = site.receiver.pid().to_string();

    let mut second = Node::new(site.folder.path(), "second");
    second.configure(&receiver_config(&free_address(), &site.store, "primary", &site.primary.key()));
    second.launch();
    let line = eventually("the second node tells who has the store", Duration::from_secs(20), || {
        let log = second.log();
        log.lines().find(|l| l.contains("belongs to a running node")).map(str::to_owned)
    });
    println!("second: {line}");
    assert!(line.contains(&pid) && line.contains(site.store.to_str().expect("UTF-8")), "{line}");
    second.kill();

    let check = second.ask(&["check", site.store.to_str().expect("UTF-8")]);
    let said = text(&check);
    println!("check: {}", said.trim());
    assert!(!check.status.success() && said.contains(&pid) && said.trim().lines().count() == 1, "{said}");
    site.goes_on("db", 2);
    site.copy_equals("db", &image);
}

#[test]
fn an_unknown_key_of_the_configuration_is_named_with_its_line() {
    let folder = scratch();
    let mut node = Node::new(folder.path(), "node");
    let config = receiver_config(&free_address(), &folder.path().join("store"), "a", &node.key());
    node.configure(&config.replace("listen", "lisen"));
    node.launch();
    let (success, said) = node.ended(Duration::from_secs(20));
    println!("{}", said.trim());
    assert!(!success);
    assert!(said.contains("twinsite.toml:5: unknown key 'lisen'") && said.contains("did you mean 'listen'"), "{said}");
    assert!(!folder.path().join("store").exists(), "nothing is made from a configuration that is wrong");
}

/// Would catch a refusal that only the side which refuses can explain: each end's own line is the other's, word for word.
#[test]
fn sides_of_other_builds_are_told_at_both_ends() {
    let mut site = Site::new();
    let (good, newer) = (site.image("good.raw", 8 * MIB), FalsePrimary::new());
    let config = receiver_config(&site.listen, &site.store, "primary", &site.primary.key());
    site.receiver.configure(&format!("{config}\n[[receiver.client]]\nname = \"newer\"\nkey = \"{}\"\n", newer.key()));
    site.receiver.start();

    let hello = || FalsePrimary::hello("db", 8 * MIB);
    let hellos = [
        ("version", CloseCode::Version, Hello { version_min: 7, version_max: 9, ..hello() }),
        ("blocks", CloseCode::Mismatch, Hello { block_bytes: 65536, ..hello() }),
    ];
    let mut groups = site.group("good", &good);
    let mut doubles = Vec::new();
    for (group, code, hello) in hellos {
        let answer = newer.refused(&site.listen, &site.receiver_key, hello);
        let Message::Close { code: told, reason } = &answer else { panic!("not refused: {answer:?}") };
        assert_eq!(*told, code as u16, "{reason}");
        assert_eq!(reason.lines().count(), 1, "{reason}");
        site.receiver_says(&["WARN", "newer", reason]);
        // A receiver of another build says the same to our primary.
        let image = site.image(&format!("{group}.raw"), 8 * MIB);
        let double = FalseReceiver::start(&site.primary.key(), answer.clone());
        groups += &site.group_to(group, &image, &double.address.to_string(), &double.key);
        doubles.push((group, double, reason.clone()));
    }
    assert!(doubles[0].2.contains("7 to 9") && doubles[1].2.contains("65536"), "what differs is named");
    assert!(
        site.receiver.copy("newer", "db").is_null() && !site.store.join("newer/db").exists(),
        "nothing is made for a refusal"
    );

    // One that answers a hello of version 1 with a version that we do not speak.
    let writer = proto::SessionToken::default();
    let welcome = Message::Welcome {
        version: 2,
        generation: Generation(1),
        committed: None,
        writer,
        epochs_in_flight_max: 8,
        staged: None,
    };
    let image = site.image("welcome.raw", 8 * MIB);
    let double = FalseReceiver::start(&site.primary.key(), welcome);
    groups += &site.group_to("welcome", &image, &double.address.to_string(), &double.key);
    doubles.push(("welcome", double, "speaks version 2, this side 1 to 1".to_owned()));

    site.primary.configure(&groups);
    site.primary.start();
    for (group, _, reason) in &doubles {
        let error = site.error(group);
        assert!(error.contains(reason), "{error}");
        let status = site.primary.primary(group);
        assert!(status["state"] == "refused" && status["committed"].is_null(), "{status:#}");
        site.write(group, 0, &noise(2, MIB as usize));
        let log = site.primary.log();
        assert_eq!(log.lines().filter(|line| line.contains(reason)).count(), 1, "said once:\n{log}");
    }
    site.goes_on("good", 1);
    site.copy_equals("good", &good);
}

/// Would catch a primary that gives a guest an error, or an epoch a hole, because its own small files find no space.
#[test]
fn a_full_state_folder_at_the_primary_costs_the_guest_nothing() {
    need_root();
    need(&[("mount", "mount"), ("umount", "mount")]);
    let _alone = one_at_a_time();
    let mut site = Site::new();
    let state = site.folder.path().join("small-state");
    let _space = small_tmpfs(&state, 2);
    let image = site.image("image.raw", 64 * MIB);
    let group = site.group("db", &image).replace("interval", "freeze_budget = \"1MiB\"\ninterval");
    let keys = site.primary.folder.join("state");
    run("cp", &["--archive", &format!("{}/.", keys.display()), state.to_str().expect("UTF-8")]);
    site.primary.configure(&group);
    let config = std::fs::read_to_string(site.primary.config()).expect("its configuration");
    let config = config.replace(keys.to_str().expect("UTF-8"), state.to_str().expect("UTF-8"));
    std::fs::write(site.primary.config(), config).expect("its configuration");

    // No room for anything new: what the primary must not forget has its space already, also across a restart.
    let filler = state.join("filler");
    let fill = || {
        let mut file = std::fs::File::create(&filler).expect("a file");
        while file.write_all(&[1; 4096]).is_ok() {}
    };
    site.receiver.start();
    site.primary.start();
    site.goes_on("db", 1);
    fill();
    site.goes_on("db", 2);
    site.primary.stop();
    site.primary.start();
    site.goes_on("db", 3);

    // No room for blocks that are about to be overwritten: a receiver that takes data in gulps makes passes slow enough.
    let says = "cannot keep a block before it is overwritten";
    let mut round = 0;
    eventually("the spill file is full", Duration::from_secs(30), || {
        for at in 0..24 {
            match at % 8 {
                0 => site.receiver.signal(Signal::CONT),
                2 => site.receiver.signal(Signal::STOP),
                _ => {}
            }
            site.write("db", at * MIB, &noise(1000 * round + at, MIB as usize));
        }
        round += 1;
        site.primary.log().contains(says).then_some(())
    });
    site.receiver.signal(Signal::CONT);
    println!("after {round} rounds");
    let log = site.primary.log();
    let lines: Vec<_> = log.lines().filter(|line| line.contains(says)).collect();
    println!("primary: {} ({} such lines)", lines[0], lines.len());
    assert!(lines[0].contains("No space left") && lines[0].contains("state_dir"), "{}", lines[0]);
    site.goes_on("db", 4);
    let status = site.primary.primary("db");
    assert!(status["epochs_merged"].as_u64() > Some(0) && status["error"].is_null(), "{status:#}");
    site.copy_equals("db", &image);
}

/// Would catch a race between two administrators: two forks, two writable exports, or a command that tells what is not so.
#[test]
fn two_failovers_at_once_have_one_outcome() {
    let mut site = Site::new();
    let groups = ["different-points", "one-point", "one-address", "default-point"];
    let images = groups.map(|group| site.image(&format!("{group}.raw"), 4 * MIB));
    site.primary.configure(&groups.iter().zip(&images).map(|(group, image)| site.group(group, image)).collect::<String>());
    site.receiver.start();
    site.primary.start();
    for group in groups {
        site.primary.committed(group);
        site.goes_on(group, 1);
    }
    site.primary.kill();
    for group in groups {
        let points = site.receiver.points(group);
        let (older, newer) = (points[0].0.clone(), points[points.len() - 1].0.clone());
        assert_ne!(older, newer);
        let sockets = ["a", "b"].map(|name| site.folder.path().join(format!("{group}-{name}.sock")));
        let wanted = match group {
            "different-points" => [(Some(&older), &sockets[0]), (Some(&newer), &sockets[1])],
            "one-point" => [(Some(&older), &sockets[0]), (Some(&older), &sockets[1])],
            "one-address" => [(None, &sockets[0]), (None, &sockets[0])],
            _ => [(None, &sockets[0]), (None, &sockets[1])],
        };
        let commands = wanted.map(|(point, socket)| {
            let mut command = site.receiver.command(&["failover", group, "--yes", "--force", "--json"]);
            command.arg("--export").arg(format!("unix:{}", socket.display()));
            command.args(point.iter().flat_map(|point| ["--point", point.as_str()]));
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary")
        });
        let ended = commands.map(|command| command.wait_with_output().expect("its end"));

        let copy = site.receiver.copy("primary", group);
        let active = &copy["active"];
        println!("{group}: active from {} at {}", active["point"], active["export"]);
        assert!(copy["state"] == "active" && copy["generation"] == 2, "raised once: {copy:#}");
        let mut succeeded = 0;
        for (output, (point, _)) in ended.iter().zip(wanted) {
            let said = text(output);
            if output.status.success() {
                succeeded += 1;
                let done: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
                assert!(done["point"] == active["point"] && done["generation"] == 2, "{done:#}");
            } else {
                println!("  refused: {}", said.trim());
                assert_eq!(said.trim().lines().count(), 1, "{said}");
                let active = active["point"].as_str().expect("a point");
                assert!(said.contains(&format!("is active already, from point {active}")), "{said}");
                assert_ne!(point.map(String::as_str), Some(active), "{said}");
            }
        }
        // Who asks for the point that is active gets it, at its own address.
        assert_eq!(succeeded, if group == "different-points" { 1 } else { 2 });
        let served: Vec<_> =
            sockets.iter().filter_map(|socket| Nbd::connect(socket, "data").ok().map(|nbd| (socket, nbd))).collect();
        let [(socket, mut nbd)] = <[_; 1]>::try_from(served).expect("one writable export");
        assert_eq!(active["export"], format!("unix:{}", socket.display()));
        nbd.write(0, &noise(2, 4096)).expect("it is writable");
        let forks = std::fs::read_dir(site.store.join("primary").join(group).join("forks")).expect("its forks").count();
        assert_eq!(forks, 1);
    }
}

/// Would catch a thread, a lock or a space check that groups share: one client's full disk must be its own trouble.
#[test]
fn a_full_disk_of_one_group_leaves_the_others_committing() {
    need_root();
    need(&[("mount", "mount"), ("umount", "mount")]);
    let _alone = one_at_a_time();
    let mut site = Site::new();
    let mut other = Node::new(site.folder.path(), "other");
    let config = receiver_config(&site.listen, &site.store, "primary", &site.primary.key());
    site.receiver.configure(&format!("{config}\n[[receiver.client]]\nname = \"other\"\nkey = \"{}\"\n", other.key()));
    let (image, theirs) = (site.image("image.raw", 64 * MIB), other.folder.join("image.raw"));
    site.primary.configure(&site.group("db", &image));
    sparse(&theirs, 8 * MIB);
    let socket = other.folder.join("db.sock");
    other.configure(&group_config("db", &site.listen, &site.receiver_key, "50ms", &[("data", &theirs, &socket)]));
    // The folder of a client is a file system of its own.
    let small = site.store.join("primary");
    std::fs::create_dir(&site.store).expect("the store");
    let _space = small_tmpfs(&small, 16);
    site.receiver.start();
    site.primary.start();
    other.start();
    site.goes_on("db", 1);
    let mut nbd = Nbd::connect(&socket, "data").expect("the other's export");
    site.write("db", 0, &noise(2, 32 * MIB as usize));
    let error = site.error("db");
    assert!(error.contains("space"), "{error}");
    let kept = site.receiver.points("primary/db");
    for round in 0..5 {
        nbd.write(round * MIB, &noise(round, MIB as usize)).expect("a write");
        let before = site.receiver.copy("other", "db")["points"].as_u64().expect("points");
        let status = other.committed("db");
        assert!(status["state"] == "streaming" && status["error"].is_null(), "{status:#}");
        assert!(site.receiver.copy("other", "db")["points"].as_u64() >= Some(before), "{status:#}");
    }
    assert_eq!(site.receiver.points("primary/db"), kept, "it was full all the time");
    assert!(!other.log().contains("WARN"), "the other's log tells of nothing:\n{}", other.log());
    run("mount", &["-o", "remount,size=200m", small.to_str().expect("UTF-8")]);
    let status = site.primary.committed("db");
    assert!(status["error"].is_null(), "{status:#}");
    site.copy_equals("primary/db", &image);
}
