//! Hooks around a failover and a drill, with the real binary.
//!
//! Would catch: a failing hook before that does not stop the failover or changes something nevertheless, one after that undoes it or
//! is silent, a hook that holds up the first write longer than its limit, a record that does not outlive a SIGKILL.

#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod support;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::{Duration, Instant};

use serde_json::Value;
use support::nbd::Nbd;
use support::node::{COMMIT_WITHIN, Pair};
use support::{eventually, noise, scratch, text};

const MIB: u64 = 1 << 20;

struct Scene {
    pair: Pair,
    hooks: PathBuf,
    copy: PathBuf,
}

impl Scene {
    /// A pair whose primary was stopped, and whose receiver has these hooks: name and body.
    fn start(folder: &Path, timeout: &str, hooks: &[(&str, &str)]) -> Self {
        let mut pair = Pair::start(folder, "db", "100ms", &[("root", 4 * MIB)]);
        Nbd::connect(&pair.sockets[0], "root").unwrap().write(0, &noise(1, 4096)).unwrap();
        pair.primary.committed("db");
        pair.primary.stop();
        pair.receiver.stop();
        let scene = Self { hooks: folder.join("hooks"), copy: folder.join("copy.sock"), pair };
        std::fs::create_dir(&scene.hooks).unwrap();
        let mut config = std::fs::read_to_string(scene.pair.receiver.config()).unwrap();
        config.push_str(&format!("\n[hooks]\ntimeout = \"{timeout}\"\n"));
        for (name, body) in hooks {
            scene.script(name, body);
            config.push_str(&format!("{} = \"{}\"\n", name.replace('-', "_"), scene.hooks.join(name).display()));
        }
        std::fs::write(scene.pair.receiver.config(), config).unwrap();
        let mut scene = scene;
        scene.pair.receiver.start();
        scene
    }

    fn script(&self, name: &str, body: &str) {
        let path = self.hooks.join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn failover(&self, args: &[&str]) -> Output {
        let export = format!("unix:{}", self.copy.display());
        self.pair.receiver.ask(&[&["failover", "db", "--export", &export, "--yes"], args].concat())
    }

    /// Nothing of a failover has happened.
    #[track_caller]
    fn unchanged(&self) {
        let copy = self.pair.receiver.copy("primary", "db");
        assert!(copy["state"] == "waiting" && copy["generation"] == 1 && copy["active"].is_null(), "{copy:#}");
        assert!(!self.copy.exists() && !self.pair.store.join("primary/db/forks/active-2").exists());
    }

    fn runs(&self) -> Vec<Value> {
        self.pair.receiver.json(&["hooks"])["runs"].as_array().unwrap().clone()
    }

    fn served(&self) {
        assert!(Nbd::connect(&self.copy, "root").unwrap().read(0, 4096).unwrap() == noise(1, 4096));
    }
}

#[track_caller]
fn refused(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    assert!(output.status.code() == Some(1) && said.lines().count() == 1, "{}", text(output));
    said
}

#[test]
fn a_hook_before_that_fails_stops_the_failover_and_one_after_does_not() {
    let folder = scratch();
    let order = folder.path().join("order");
    let note = |what: &str| {
        format!("test -S {}/copy.sock && served=yes || served=no", folder.path().display())
            + &format!("; echo {what} $TWINSITE_POINT $TWINSITE_GENERATION $TWINSITE_REPEATED $served >> {}", order.display())
    };
    let before = note("before") + "; echo the licence is missing; exit 7";
    let after = note("after") + "; echo no such address >&2; exit 8";
    let scene = Scene::start(folder.path(), "60s", &[("pre-failover", &before), ("post-failover", &after)]);
    let plan = scene.pair.receiver.json(&["failover", "db", "--preview"]);
    assert_eq!(plan["hooks"].as_array().unwrap().len(), 2, "{plan:#}");
    let point = plan["point"].as_str().unwrap().to_owned();

    let said = refused(&scene.failover(&[]));
    assert!(said.starts_with("hook pre-failover (") && said.contains("failed with exit code 7; it said: the licence is missing"));
    assert!(said.contains("nothing was changed; --ignore-hooks"), "{said}");
    scene.unchanged();

    let done = scene.failover(&["--ignore-hooks"]);
    let told = text(&done);
    assert!(done.status.success(), "{told}");
    assert!(told.contains("WARNING: hook post-failover failed with exit code 8: the copy is active"), "{told}");
    scene.served();
    let noted = std::fs::read_to_string(&order).unwrap();
    let wanted = format!("before {point} 2 no yes\n").repeat(2) + &format!("after {point} 2 no yes\n");
    // The address is bound before the hook, so that one in use does not run it for nothing.
    assert_eq!(noted, wanted);
    let status = scene.pair.receiver.cli(&["status"]);
    assert!(status.contains("hook post-failover of primary/db failed with exit code 8"), "{status}");
    assert!(status.contains("| no such address"), "{status}");
    let log = scene.pair.receiver.log();
    assert!(log.contains("failed with exit code 8") && !log.contains("no such address"), "what a hook prints is not for the log");

    // Asked again, as after a crash in between: told so, and done.
    scene.script("pre-failover", &note("again"));
    scene.script("post-failover", "");
    let again = scene.failover(&["--json"]);
    assert!(again.status.success(), "{}", text(&again));
    let done: Value = serde_json::from_slice(&again.stdout).unwrap();
    let outcomes: Vec<&Value> = done["hooks"].as_array().unwrap().iter().map(|run| &run["outcome"]).collect();
    assert_eq!(outcomes, ["succeeded", "succeeded"], "{done:#}");
    assert!(std::fs::read_to_string(&order).unwrap().contains(&format!("again {point} 2 yes")));
}

#[test]
fn hooks_that_hang_hold_up_no_more_than_they_may() {
    let folder = scratch();
    let scene = Scene::start(folder.path(), "500ms", &[("pre-failover", "sleep 1000"), ("post-failover", "sleep 1000")]);
    let said = refused(&scene.failover(&[]));
    assert!(said.contains("did not end within 500 ms and was killed"), "{said}");
    scene.unchanged();
    let mut command = scene.pair.receiver.command(&["failover", "db", "--yes", "--ignore-hooks"]);
    let mut command = command.arg("--export").arg(format!("unix:{}", scene.copy.display())).spawn().unwrap();
    // Long before the hooks would end by themselves.
    eventually("the copy is served", COMMIT_WITHIN, || {
        let mut nbd = Nbd::connect(&scene.copy, "root").ok()?;
        nbd.write(4096, &noise(2, 4096)).ok()
    });
    assert!(command.wait().unwrap().success());
    let runs = scene.runs();
    let outcomes: Vec<Value> = runs.iter().map(|run| run["outcome"].clone()).collect();
    assert_eq!(outcomes, ["timed-out"; 3]);
    for run in &runs {
        assert!((500..4000).contains(&run["duration_ms"].as_u64().expect("a duration")), "{run:#}");
    }
}

#[test]
fn a_hook_that_is_missing_or_anybodys_is_told_before_the_disaster() {
    let folder = scratch();
    let scene = Scene::start(folder.path(), "60s", &[("pre-failover", "exit 0"), ("post-failover", "exit 0")]);
    let pre = scene.hooks.join("pre-failover");
    std::fs::set_permissions(&pre, std::fs::Permissions::from_mode(0o777)).unwrap();
    std::fs::remove_file(scene.hooks.join("post-failover")).unwrap();
    let told = scene.pair.receiver.cli(&["failover", "db", "--preview"]);
    assert!(
        told.contains("hook        pre-failover: WILL FAIL: ") && told.contains("can be changed by others (mode 0777)"),
        "{told}"
    );
    assert!(told.contains("hook        post-failover: WILL FAIL: ") && told.contains("is missing"), "{told}");
    let said = refused(&scene.failover(&[]));
    assert!(said.contains("was not run: it can be changed by others (mode 0777): run chmod go-w"), "{said}");
    scene.unchanged();
    let checked = scene.pair.receiver.ask(&["run", "--check"]);
    let told = text(&checked);
    assert!(checked.status.success() && told.matches("WARNING: hook p").count() == 2, "{told}");
    std::fs::set_permissions(&pre, std::fs::Permissions::from_mode(0o755)).unwrap();
    let done = scene.failover(&[]);
    assert!(done.status.success() && text(&done).contains("post-failover was not run: it is missing"), "{}", text(&done));
    scene.served();
}

#[test]
fn a_node_that_is_killed_while_a_hook_runs_knows_it_afterwards() {
    let folder = scratch();
    let started = folder.path().join("started");
    let body = format!("echo $$ > {}; exec sleep 60", started.display());
    let mut scene = Scene::start(folder.path(), "60s", &[("pre-failover", &body)]);
    let mut command = scene.pair.receiver.command(&["failover", "db", "--yes"]);
    command.arg("--export").arg(format!("unix:{}", scene.copy.display()));
    let mut asking = command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().unwrap();
    let pid: i32 =
        eventually("the hook runs", Duration::from_secs(20), || std::fs::read_to_string(&started).ok()?.trim().parse().ok());
    scene.pair.receiver.kill();
    assert!(!asking.wait().unwrap().success());
    // Nobody watches it any more.
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), rustix::process::Signal::KILL).unwrap();
    let _ = std::fs::remove_file(&scene.copy);
    scene.pair.receiver.start();
    let runs = scene.runs();
    assert!(runs.len() == 1 && runs[0]["outcome"] == "interrupted", "{runs:#?}");
    scene.unchanged();
    scene.script("pre-failover", "exit 0");
    let done = scene.failover(&[]);
    assert!(done.status.success(), "{}", text(&done));
    scene.served();
    assert_eq!(scene.runs()[1]["outcome"], "succeeded");
}

/// Would catch a drill that goes on without what its hook had to prepare, that is served before, whose fork is left behind, or after which nothing is
/// cleared away.
#[test]
fn the_hook_before_a_drill_stops_it_and_the_one_after_it_follows_its_end() {
    let folder = scratch();
    let noted = folder.path().join("noted");
    let note = |what: &str| {
        let drill = folder.path().join("drill.sock");
        format!("test -S {} && served=yes || served=no\n", drill.display())
            + &format!("echo {what} $TWINSITE_DRILL $TWINSITE_POINT $TWINSITE_GENERATION $served >> {}", noted.display())
    };
    let (before, after) = (note("before"), note("after"));
    let refusing = format!("{before}; echo no network for drills; exit 3");
    let mut scene = Scene::start(folder.path(), "60s", &[("pre-drill", &refusing), ("post-drill", &after)]);
    let point = scene.pair.receiver.points("db").last().unwrap().0.clone();
    let export = format!("unix:{}", folder.path().join("drill.sock").display());
    let forks = scene.pair.store.join("primary/db/forks");
    let forks = || std::fs::read_dir(&forks).unwrap().count();
    let drills = |scene: &Scene| scene.pair.receiver.json(&["drill", "list"])["drills"].as_array().unwrap().len();

    let said = refused(&scene.pair.receiver.ask(&["drill", "db", "--export", &export]));
    assert!(said.starts_with("hook pre-drill (") && said.contains("exit code 3; it said: no network for drills"), "{said}");
    assert!(said.contains("--ignore-hooks"), "{said}");
    assert_eq!(
        (drills(&scene), forks(), std::fs::read_to_string(&noted).unwrap()),
        (0, 0, format!("before drill-1 {point} 1 no\n"))
    );
    // What is only read is no drill.
    let to = folder.path().join("root.raw");
    scene.pair.receiver.cli(&["export", "db", "--to", to.to_str().unwrap()]);
    assert_eq!(scene.runs().len(), 1);

    scene.pair.receiver.cli(&["drill", "db", "--name", "x", "--export", &export, "--ignore-hooks"]);
    Nbd::connect(&folder.path().join("drill.sock"), "root").unwrap().write(0, &noise(3, 4096)).unwrap();
    scene.pair.receiver.cli(&["drill", "end", "x"]);
    let ran = |scene: &Scene, count: usize| {
        eventually("the hooks have run", Duration::from_secs(20), || {
            let runs = scene.runs();
            (runs.len() == count && runs.iter().all(|run| run["outcome"] != "running")).then_some(runs)
        })
    };
    let runs = ran(&scene, 3);
    assert_eq!((&runs[2]["hook"], &runs[2]["outcome"]), (&Value::from("post-drill"), &Value::from("succeeded")), "{runs:#?}");
    let all = std::fs::read_to_string(&noted).unwrap();
    assert!(all.ends_with(&format!("before drill-x {point} 1 no\nafter drill-x {point} 1 no\n")), "{all}");

    // One with a script, and one that the stop of the node ends.
    scene.script("pre-drill", &before);
    scene.script("boots", "test -n \"$TWINSITE_EXPORT\" && echo boots");
    let boots = scene.hooks.join("boots");
    let done = scene.pair.receiver.ask(&["drill", "db", "--run", boots.to_str().unwrap()]);
    assert!(done.status.success(), "{}", text(&done));
    ran(&scene, 5);
    scene.pair.receiver.cli(&["drill", "db", "--name", "last", "--export", &export]);
    scene.pair.receiver.stop();
    let all = std::fs::read_to_string(&noted).unwrap();
    assert!(all.ends_with(&format!("before drill-last {point} 1 no\nafter drill-last {point} 1 no\n")), "{all}");
    scene.pair.receiver.start();
    assert_eq!((scene.runs().len(), forks()), (7, 0));

    // One that is killed with the node is followed by its hook when the node is back, once. The file of its socket stays.
    scene.pair.receiver.cli(&["drill", "db", "--name", "cut-off", "--export", &export]);
    scene.pair.receiver.kill();
    scene.pair.receiver.start();
    ran(&scene, 9);
    scene.pair.receiver.kill();
    scene.pair.receiver.start();
    let all = std::fs::read_to_string(&noted).unwrap();
    assert!(all.ends_with(&format!("before drill-cut-off {point} 1 no\nafter drill-cut-off {point} 1 yes\n")), "{all}");
    assert_eq!((ran(&scene, 9).len(), forks()), (9, 0));
}

/// A hook before a drill that hangs or prints megabytes, and a drill of the schedule that its hook stops.
#[test]
fn hooks_of_drills_that_hang_or_print_megabytes_are_bounded() {
    let folder = scratch();
    let loud = "head -c 30000000 /dev/zero | tr '\\0' x; echo; echo all printed";
    let mut scene = Scene::start(folder.path(), "500ms", &[("pre-drill", "sleep 1000"), ("post-drill", "exit 0")]);
    let export = format!("unix:{}", folder.path().join("drill.sock").display());
    let began = Instant::now();
    let said = refused(&scene.pair.receiver.ask(&["drill", "db", "--export", &export]));
    assert!(said.contains("did not end within 500 ms and was killed"), "{said}");
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    // A failover meanwhile does not wait for it.
    let go = folder.path().join("go");
    scene.script("pre-drill", &format!("until test -e {}; do sleep 0.1; done; exit 1", go.display()));
    let config = std::fs::read_to_string(scene.pair.receiver.config()).unwrap().replace("\"500ms\"", "\"60s\"");
    scene.pair.receiver.stop();
    std::fs::write(scene.pair.receiver.config(), config.clone()).unwrap();
    scene.pair.receiver.start();
    let mut drill = scene.pair.receiver.command(&["drill", "db", "--export", &export]);
    let mut drill = drill.stderr(std::process::Stdio::null()).spawn().unwrap();
    eventually("the hook runs", Duration::from_secs(20), || {
        scene.runs().last().filter(|run| run["outcome"] == "running").map(drop)
    });
    let done = scene.failover(&[]);
    assert!(done.status.success() && drill.try_wait().unwrap().is_none(), "{}", text(&done));
    scene.served();
    std::fs::write(&go, "").unwrap();
    assert!(!drill.wait().unwrap().success());

    scene.script("pre-drill", loud);
    scene.pair.receiver.cli(&["drill", "db", "--name", "loud", "--export", &export]);
    let run = scene.runs().into_iter().rev().find(|run| run["hook"] == "pre-drill").unwrap();
    assert!(run["output"].as_str().unwrap().ends_with("x\nall printed\n") && run["outcome"] == "succeeded");
    assert!(run["output"].as_str().unwrap().len() <= 64 << 10);
    scene.pair.receiver.cli(&["drill", "end", "drill-loud"]);
}

/// Would catch a drill of the schedule that is nowhere to be seen because its hook stopped it.
#[test]
fn a_drill_of_the_schedule_that_its_hook_stops_is_told() {
    let folder = scratch();
    let mut scene = Scene::start(folder.path(), "60s", &[("pre-drill", "echo no network; exit 3")]);
    scene.script("boots", "echo boots");
    let config = std::fs::read_to_string(scene.pair.receiver.config()).unwrap();
    let drill = format!("\n[[drill]]\ngroup = \"db\"\nrun = \"{}\"\nevery = \"1h\"\n", scene.hooks.join("boots").display());
    scene.pair.receiver.stop();
    std::fs::write(scene.pair.receiver.config(), config + &drill).unwrap();
    scene.pair.receiver.start();
    let last = eventually("the drill has a result", Duration::from_secs(30), || {
        let last = scene.pair.receiver.copy("primary", "db")["last_drill"].clone();
        (!last.is_null()).then_some(last)
    });
    let remark = last["remark"].as_str().unwrap();
    assert!(last["outcome"] == "not-run" && remark.contains("failed with exit code 3; it said: no network"), "{last:#}");
    assert!(!remark.contains("--ignore-hooks"), "{remark}");
}

/// Would catch a primary that stops its guest's services over and over, or not at all.
#[test]
fn a_fenced_primary_runs_its_hook_once() {
    let folder = scratch();
    let mut pair = Pair::start(folder.path(), "db", "100ms", &[("root", 4 * MIB)]);
    pair.primary.committed("db");
    pair.primary.stop();
    let (hook, noted) = (folder.path().join("hook"), folder.path().join("noted"));
    let body = format!("#!/bin/sh\necho $TWINSITE_HOOK $TWINSITE_GROUP $TWINSITE_DISKS >> {}\n", noted.display());
    std::fs::write(&hook, body).unwrap();
    std::fs::set_permissions(&hook, std::fs::Permissions::from_mode(0o755)).unwrap();
    let config = std::fs::read_to_string(pair.primary.config()).unwrap();
    std::fs::write(pair.primary.config(), format!("{config}\n[hooks]\nfenced = \"{}\"\n", hook.display())).unwrap();
    pair.primary.start();
    pair.primary.committed("db");
    assert!(!noted.exists());
    pair.receiver.failover("db", None, &folder.path().join("copy.sock"));
    let runs = || pair.primary.json(&["hooks"])["runs"].as_array().unwrap().clone();
    eventually("the hook has run", Duration::from_secs(20), || {
        runs().first().filter(|run| run["outcome"] == "succeeded").map(drop)
    });
    // Fenced for some more looks.
    let until = Instant::now() + Duration::from_secs(3);
    while Instant::now() < until {
        assert_eq!(runs().len(), 1);
        std::thread::sleep(Duration::from_millis(200));
    }
    assert_eq!(std::fs::read_to_string(&noted).unwrap(), format!("fenced db root {} -\n", 4 * MIB));
}
