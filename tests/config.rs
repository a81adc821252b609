//! `twinsite run --check`: every mistake is one line with its place, its value and its remedy.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use common::{KEY_A, KEY_B, twinsite};

/// Runs the check on `text`; returns the exit code and what was said about `t.toml`, with the folder taken out.
fn check(text: &str) -> (i32, String) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("t.toml");
    std::fs::write(&file, text).unwrap();
    let out = twinsite().args(["run", "--check", "--config"]).arg(&file).output().unwrap();
    let said = [out.stdout, out.stderr].concat();
    let said = String::from_utf8(said).unwrap().replace(&format!("{}/", folder.path().display()), "");
    (out.status.code().unwrap(), said)
}

fn group(extra: &str) -> String {
    format!(
        "[[group]]\nname = \"db\"\npeer = \"127.0.0.1:7447\"\npeer_key = \"{KEY_A}\"\n{extra}\n[[group.disk]]\nname = \"root\"\npath = \"a.raw\"\nexport = \"unix:a.sock\"\n"
    )
}

fn receiver(extra: &str) -> String {
    format!("[receiver]\nlisten = \"0.0.0.0:7447\"\nstore = \"store\"\n{extra}")
}

fn receiver_with_client() -> String {
    receiver(&format!("[[receiver.client]]\nname = \"a\"\nkey = \"{KEY_A}\"\ngroups = [\"db\"]\n"))
}

fn many_disks(count: usize) -> String {
    let one = |n| format!("[[group.disk]]\nname = \"d{n}\"\npath = \"{n}.raw\"\nexport = \"unix:{n}.sock\"\n");
    (0..count).map(one).collect()
}

/// A group that replicates a copy, on line 12.
fn onward(copy: &str) -> String {
    let group = format!("[[group]]\nname = \"db\"\npeer = \"127.0.0.1:7447\"\npeer_key = \"{KEY_B}\"\ncopy = \"{copy}\"\n");
    receiver_with_client() + &group
}

#[test]
fn a_copy_goes_onward_in_place_of_disks() {
    let (code, said) = check(&onward("a/db"));
    assert_eq!((code, said.as_str()), (0, "t.toml: valid: 1 group, 0 disks, receiver on 0.0.0.0:7447 with 1 client\n"));
}

/// What is not there may come to be until the node runs, so it is no mistake of the file.
#[test]
fn what_a_file_names_and_is_not_there_is_a_warning() {
    let drill = "[[drill]]\ngroup = \"db\"\nrun = \"/etc\"\nevery = \"1d\"\nuser = \"nobody-of-that-name\"\n";
    let disk = "[[group.disk]]\nname = \"b\"\npath = \"/dev\"\nexport = \"tcp:127.0.0.1:10809\"\ntls = { cert = \"c.crt\", key = \"/dev/null\" }\n";
    let hooks = "[hooks]\npre_failover = \"none.sh\"\n";
    let (code, said) = check(&(receiver("") + drill + &group("") + disk + hooks));
    assert_eq!(code, 0, "{said}");
    for expected in [
        "WARNING: [receiver] has no [[receiver.client]]: nobody may send a copy to it\n",
        "WARNING: group db: disk root: a.raw: No such file or directory",
        "WARNING: group db: disk b: /dev is neither a raw image nor a block device\n",
        "WARNING: group db: disk b: tls: c.crt: No such file or directory",
        "WARNING: drill of db: /etc is not a file: name an executable script\n",
        "WARNING: drill of db: there is no user 'nobody-of-that-name'\n",
        "WARNING: hook pre-failover: none.sh is missing",
    ] {
        assert!(said.contains(expected), "expected: {expected}\nsaid:     {said}");
    }
    assert_eq!(said.matches("WARNING").count(), 7, "{said}");
}

#[test]
fn a_full_file_is_valid() {
    let text = format!(
        "[node]\nname = \"alpha\"\nstate_dir = \"state\"\ncontrol = \"c.sock\"\nmetrics = \"127.0.0.1:9547\"\nio_threads = 2\nlog = \"debug\"\nstop_timeout = \"5s\"\n{}{}",
        receiver(&format!(
            "[[receiver.client]]\nname = \"beta\"\nkey = \"{KEY_B}\"\ngroups = [\"web\"]\nspace_max = \"500GiB\"\n[[receiver.client.group]]\nname = \"web\"\nspace_max = \"50GiB\"\n"
        )),
        group(
            "interval = \"10ms\"\nfreeze_budget = \"64MiB\"\nspill_limit = \"1GiB\"\nepochs_in_flight = 4\ncodec = \"raw\"\ndurability = \"flush-sync\"\nmax_lag = \"5s\"\nscrub_interval = \"7d\"\nrate_limit = \"20 Mbit/s\"\n[[group.rate_schedule]]\nfrom = \"22:00\"\nto = \"06:00\"\nlimit = \"none\""
        )
    );
    let (code, said) = check(&text);
    assert_eq!(code, 0, "{said}");
    assert!(said.starts_with("t.toml: valid: 1 group, 1 disk, receiver on 0.0.0.0:7447 with 1 client\n"), "{said}");
}

#[test]
fn every_mistake_is_one_line() {
    let tls = "[[group.disk]]\nname = \"b\"\npath = \"b.raw\"\nexport = \"tcp:127.0.0.1:10809\"\n";
    let cases: Vec<(String, &str)> = vec![
        (String::new(), "t.toml: neither a [receiver] nor a [[group]]: this node would do nothing; add one of them"),
        ("[node]\nlog = ".into(), "t.toml:2: not valid TOML: "),
        ("[nodes]\n".to_owned() + &receiver(""), "t.toml:1: unknown key 'nodes' in the file: did you mean 'node'?"),
        (group("intervall = \"1s\""), "t.toml:5: unknown key 'intervall' in [[group]] 'db': did you mean 'interval'?"),
        (
            "\"a\\nb\" = 1\n".to_owned() + &receiver(""),
            "t.toml:1: unknown key 'a\\nb' in the file: known keys are node, receiver, group, drill, hooks",
        ),
        (
            receiver("") + "\n[hooks]\npre-failover = \"a\"\n",
            "t.toml:6: unknown key 'pre-failover' in [hooks]: did you mean 'pre_failover'?",
        ),
        (
            receiver("") + "\n[hooks]\ntimeout = \"2h\"\n",
            "t.toml:6: timeout = \"2h\": is outside of its limits: choose a value from \"100ms\" to \"1h\"",
        ),
        (
            receiver("") + "\n[[hooks.group]]\nname = \"a/b/c\"\n",
            "t.toml:6: name = \"a/b/c\": is not a name: write 1 to 64 of a-z A-Z 0-9 . _ - starting with a letter or digit",
        ),
        (
            receiver("") + "\n[[hooks.group]]\nname = \"db\"\n[[hooks.group]]\nname = \"db\"\n",
            "t.toml:8: name = \"db\": is already used on line 6: put all hooks of a group into one section",
        ),
        (
            group("colour = 1"),
            "t.toml:5: unknown key 'colour' in [[group]] 'db': known keys are name, peer, peer_key, interval, freeze_budget, spill_limit, epochs_in_flight, codec, durability, when_fenced, max_lag, scrub_interval, rate_limit, rate_schedule, disk, copy",
        ),
        (
            group("interval = \"5 parsecs\""),
            "t.toml:5: interval = \"5 parsecs\": is not a duration: write a number and a unit, for example \"250ms\", \"1s\" or \"5m\"",
        ),
        (group("interval = 5"), "t.toml:5: interval = 5: is a whole number, not a string: write \"1s\""),
        (
            group("interval = \"1ms\""),
            "t.toml:5: interval = \"1ms\": is outside of its limits: choose a value from \"10ms\" to \"1d\"",
        ),
        (
            group("freeze_budget = \"64\""),
            "t.toml:5: freeze_budget = \"64\": is not a size: write a number and a unit, for example \"64MiB\" or \"500GB\"",
        ),
        (group("epochs_in_flight = 0"), "t.toml:5: epochs_in_flight = 0: is outside of its limits: choose a value from 1 to 64"),
        (group("durability = \"sync\""), "t.toml:5: durability = \"sync\": is not known here: choose one of async, flush-sync"),
        (
            group("scrub_interval = \"weekly\""),
            "t.toml:5: scrub_interval = \"weekly\": is not a duration: write a number and a unit, for example \"7d\" or \"12h\", or \"off\"",
        ),
        (
            group("scrub_interval = \"400d\""),
            "t.toml:5: scrub_interval = \"400d\": is outside of its limits: choose a value from \"1s\" to \"365d\"",
        ),
        (
            group("max_lag = \"50ms\""),
            "t.toml:5: max_lag = \"50ms\": is outside of its limits: choose a value from \"100ms\" to \"1d\"",
        ),
        (
            group("rate_limit = \"20 MB/s\""),
            "t.toml:5: rate_limit = \"20 MB/s\": is not a rate: write bits a second from \"64 kbit/s\" to \"1000 Gbit/s\", for example \"20 Mbit/s\", or \"none\"",
        ),
        (
            group("[[group.rate_schedule]]\nfrom = \"22:00\"\nto = \"6am\"\nlimit = \"none\""),
            "t.toml:7: to = \"6am\": is not a time of day: write hours and minutes, for example \"22:00\"",
        ),
        (
            group("[[group.rate_schedule]]\nfrom = \"22:00\"\nto = \"22:00\"\nlimit = \"none\""),
            "t.toml:7: to = \"22:00\": is the same time as from: give the window a length; what holds all day is rate_limit",
        ),
        (
            group("[[group.rate_schedule]]\nfrom = \"22:00\"\nto = \"06:00\""),
            "t.toml:5: [[group.rate_schedule]] has no key 'limit': add a line such as limit = \"none\"",
        ),
        (
            receiver("[[drill]]\ngroup = \"db\"\nrun = \"s.sh\""),
            "t.toml:4: [[drill]] has no key 'every': add a line such as every = \"1d\", or at = \"03:00\"",
        ),
        (
            receiver("[[drill]]\ngroup = \"db\"\nrun = \"s.sh\"\nevery = \"1d\"\nat = \"03:00\""),
            "t.toml:8: at = \"03:00\": is given beside every: keep one of the two",
        ),
        (
            receiver("[[drill]]\ngroup = \"a/b/c\"\nrun = \"s.sh\"\nevery = \"10s\""),
            "t.toml:5: group = \"a/b/c\": is not a name: write 1 to 64 of a-z A-Z 0-9 . _ - starting with a letter or digit\n\
             t.toml:7: every = \"10s\": is outside of its limits: choose a value from \"1min\" to \"365d\"",
        ),
        (
            "[[drill]]\ngroup = \"db\"\nrun = \"s.sh\"\nevery = \"1d\"\n".to_owned(),
            "t.toml:1: [[drill]] needs a [receiver]: drills are done where the copies are; move it to that node's configuration",
        ),
        (
            receiver_with_client() + "[[drill]]\ngroup = \"gamma/db\"\nrun = \"s.sh\"\nevery = \"1d\"\n",
            "t.toml:9: group = \"gamma/db\": is of a client that is not known here: the names of [[receiver.client]] are a",
        ),
        (
            receiver_with_client() + "[[drill]]\ngroup = \"web\"\nrun = \"s.sh\"\nevery = \"1d\"\n",
            "t.toml:9: group = \"web\": is a group that its client may not send: add it to groups of that [[receiver.client]]",
        ),
        (group(&many_disks(64)), "t.toml:262: [[group]] 'db' has more than 64 disks: make two groups of it"),
        (
            receiver("retention = \"7d\"\n"),
            "t.toml:4: retention = \"7d\": is a string, not a list: write a list such as [\"all for 10m\", \"1h for 3d\"]",
        ),
        (
            "[node]\nmetrics = \"9547\"\n".to_owned() + &receiver(""),
            "t.toml:2: metrics = \"9547\": is not a local address: write an IP address and a port, for example \"127.0.0.1:9547\"",
        ),
        (
            group("copy = \"a/db\""),
            "t.toml:5: copy = \"a/db\": is given beside [[group.disk]]: a group replicates disks or a copy; make two groups of it\n\
             t.toml:5: copy = \"a/db\": needs a [receiver]: a copy is replicated onward by the node that keeps it",
        ),
        (onward("a/db/c"), "t.toml:12: copy = \"a/db/c\": is not a copy: write CLIENT/GROUP, for example \"alpha/db\""),
        (onward("../db"), "t.toml:12: copy = \"../db\": is not a copy: write CLIENT/GROUP, for example \"alpha/db\""),
        (
            onward("b/db"),
            "t.toml:12: copy = \"b/db\": is of a client that is not known here: the names of [[receiver.client]] are a",
        ),
        (
            onward("a/web"),
            "t.toml:12: copy = \"a/web\": is a group that its client may not send: add it to groups of that [[receiver.client]]",
        ),
        (
            onward("a/db") + &onward("a/db")[receiver_with_client().len()..].replace("name = \"db\"", "name = \"again\""),
            "t.toml:17: copy = \"a/db\": is already used on line 12: one copy is replicated onward by one group",
        ),
        (group("codec = \"zip\""), "t.toml:5: codec = \"zip\": is not known here: choose one of lz4, raw"),
        (
            "[[group]]\nname = \"db\"\npeer = \"nowhere\"\n".to_owned(),
            "t.toml:1: [[group]] 'db' has no key 'peer_key': add a line such as peer_key = \"SHA256:…\"\n\
             t.toml:1: [[group]] 'db' has no disk: add a [[group.disk]] section below it, or copy = \"CLIENT/GROUP\" to replicate a copy onward\n\
             t.toml:3: peer = \"nowhere\": is not an address: write host:port, for example \"backup.example.com:7447\"",
        ),
        (
            group("").replace(KEY_A, "SHA256:abc"),
            "t.toml:4: peer_key = \"SHA256:abc\": is not a key: copy the SHA256:… line that `twinsite id` prints on the other machine",
        ),
        (
            group("").replace("name = \"db\"", "name = \"../db\""),
            "t.toml:2: name = \"../db\": is not a name: write 1 to 64 of a-z A-Z 0-9 . _ - starting with a letter or digit",
        ),
        (
            group("").replace("unix:a.sock", "a.sock"),
            "t.toml:9: export = \"a.sock\": is not an export address: write \"unix:/path/to/socket\" or \"tcp:127.0.0.1:10809\"",
        ),
        (
            group("").replace("unix:a.sock", &format!("unix:/{}", "x".repeat(120))),
            "is too long for a unix socket (121 bytes, at most 107): choose a shorter path",
        ),
        (
            group("") + &group("").replace("a.", "b."),
            "t.toml:11: name = \"db\": is already used on line 2: give each group a name of its own",
        ),
        (
            group("") + &group("").replace("\"db\"", "\"web\"").replace("a.sock", "b.sock"),
            "t.toml:17: path = \"a.raw\": is already used on line 8: one disk is protected by one group",
        ),
        (
            group("") + &group("").replace("\"db\"", "\"web\"").replace("a.raw", "b.raw"),
            "t.toml:18: export = \"unix:a.sock\": is already used on line 9: two disks of one name need two addresses: choose another export",
        ),
        (
            group("") + "tls = { cert = \"c\", key = \"k\" }\n",
            "t.toml:10: tls = { … }: is for tcp exports only: remove it, or export over tcp",
        ),
        (
            group("") + tls + "tls = { cert = \"c\" }\n",
            "tls has no key 'key': add a line such as key = \"/etc/twinsite/nbd.key\"",
        ),
        (
            group("") + tls + "tls = { cert = \"c\", key = \"k\" }\n" + &tls.replace("\"b\"", "\"c\"").replace("b.raw", "c.raw"),
            "t.toml:18: export = \"tcp:127.0.0.1:10809\": has another tls setting than line 13: give all disks of one address the same tls",
        ),
        (
            receiver("").replace("0.0.0.0:7447", "7447"),
            "t.toml:2: listen = \"7447\": is not a local address: write an IP address and a port, for example \"0.0.0.0:7447\"",
        ),
        (receiver("").replace("\"store\"", "\"\""), "t.toml:3: store = \"\": is empty: give a path"),
        (
            receiver(&format!("[[receiver.client]]\nname = \"a\"\nkey = \"{KEY_A}\"\ngroups = []\n")),
            "t.toml:7: groups = []: is empty: name at least one group, or remove the key to allow every group",
        ),
        (
            receiver(&format!(
                "[[receiver.client]]\nname = \"a\"\nkey = \"{KEY_A}\"\n[[receiver.client.group]]\nname = \"db\"\n"
            )),
            "[[receiver.client.group]] 'db' has no key 'space_max': add a line such as space_max = \"50GiB\"",
        ),
        (
            receiver(&format!(
                "[[receiver.client]]\nname = \"a\"\nkey = \"{KEY_A}\"\ngroups = [\"web\"]\n[[receiver.client.group]]\nname = \"db\"\nspace_max = \"1GiB\"\n"
            )),
            "t.toml:9: name = \"db\": is not in the client's groups: add it there, or leave groups out to allow any",
        ),
        (
            receiver(&format!(
                "[[receiver.client]]\nname = \"a\"\nkey = \"{KEY_A}\"\n{0}{0}",
                "[[receiver.client.group]]\nname = \"db\"\nspace_max = \"1GiB\"\n"
            )),
            "t.toml:11: name = \"db\": is already used on line 8: name each group of a client once",
        ),
        (
            receiver(&format!(
                "[[receiver.client]]\nname = \"a\"\nkey = \"{KEY_A}\"\n[[receiver.client]]\nname = \"b\"\nkey = \"{KEY_A}\"\n"
            )),
            "is already used on line 6: each machine has one key and one [[receiver.client]]",
        ),
        (
            receiver("client = \"a\"\n"),
            "t.toml:4: client = \"a\": is a string, not a list of sections: write [[…]] on a line of its own, once for each",
        ),
        (
            "node = 1\n".to_owned() + &receiver(""),
            "t.toml:1: node = 1: is a whole number, not a section: write its keys on lines below […], or { key = value, … }",
        ),
        (
            "[node]\nlog = \"loud\"\n".to_owned() + &receiver(""),
            "t.toml:2: log = \"loud\": is not known here: choose one of error, warn, info, debug, trace",
        ),
    ];
    for (text, expected) in cases {
        let (code, said) = check(&text);
        assert_eq!(code, 2, "{said}\n{text}");
        assert!(said.contains(expected), "expected: {expected}\nsaid:     {said}\n{text}");
        assert_eq!(said.lines().count(), expected.lines().count(), "one line for each mistake: {said}");
    }
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let out = twinsite().args(["run", "--check", "--config", "/nonexistent/t.toml"]).output().unwrap();
    let said = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(2));
    assert!(
        said.starts_with("/nonexistent/t.toml: cannot read the configuration: No such file") && said.contains("--config FILE"),
        "{said}"
    );
}

/// The example of the documentation is a file that works.
#[test]
fn the_example_in_the_documentation_is_valid() {
    let text = include_str!("../docs/operations.md");
    let example = text.split("```toml\n").nth(1).and_then(|t| t.split("```").next()).expect("docs/operations.md has an example");
    let (code, said) = check(&example.replace("SHA256:…", KEY_A).replacen(KEY_A, KEY_B, 1));
    assert_eq!(code, 0, "{said}");
}
