//! Real processes, on a runtime as the node has one.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use proto::{EpochId, Generation};

use super::*;
use crate::config::Config;

fn script(folder: &Path, name: &str, body: &str) -> PathBuf {
    let path = folder.join(name);
    crate::script::executable(&path, &format!("#!/bin/sh\n{body}\n"));
    path
}

fn facts() -> Facts {
    Facts {
        client: Some("alpha".parse().unwrap()),
        group: "db".parse().unwrap(),
        point: Some(Point { generation: Generation(1), epoch: EpochId(7) }),
        generation: Generation(2),
        export: Some("unix:/run/x.sock".to_owned()),
        disks: vec![
            ("root".parse().unwrap(), 4096, Some("nbd+unix:///root?socket=/run/x.sock".to_owned())),
            ("data".parse().unwrap(), 8192, None),
        ],
        repeated: false,
        drill: None,
    }
}

fn hooks(folder: &Path, text: &str) -> Arc<Hooks> {
    let config = Config::parse(&folder.join("t.toml"), text).unwrap();
    Hooks::open(config.hooks, "beta", folder).unwrap()
}

/// Runs the hook before a failover whose script is `body`, with `limit`.
fn ran(folder: &Path, limit: &str, body: &str) -> (Result<Option<HookRun>, HookError>, Arc<Hooks>) {
    script(folder, "hook", body);
    let hooks = hooks(folder, &format!("[hooks]\ntimeout = \"{limit}\"\npre_failover = \"hook\"\n"));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let result = runtime.block_on(hooks.run(Transition::Failover, Phase::Pre, &facts()));
    (result, hooks)
}

/// Would catch an environment that leaks the node's, a missing variable, an inherited descriptor, another working folder.
#[test]
fn a_hook_is_told_the_facts_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let _open = std::fs::File::open(folder.path()).unwrap();
    let (run, hooks) = ran(folder.path(), "60s", "env | sort; pwd; cat; ls /proc/self/fd | tr '\\n' ' '");
    let run = run.unwrap().unwrap();
    let own = |line: &&str| !["PWD=", "SHLVL=", "_=", "OLDPWD="].iter().any(|p| line.starts_with(p));
    let lines: Vec<&str> = run.output.lines().filter(own).collect();
    let wanted = [
        "TWINSITE_CLIENT=alpha",
        "TWINSITE_DRILL=",
        "TWINSITE_FORK=",
        "TWINSITE_EXPORT=unix:/run/x.sock",
        "TWINSITE_GENERATION=2",
        "TWINSITE_GROUP=db",
        "TWINSITE_HOOK=pre-failover",
        "TWINSITE_NODE=beta",
        "TWINSITE_POINT=1.7",
        "TWINSITE_REPEATED=no",
    ];
    for line in wanted {
        assert!(lines.contains(&line), "{line} is not in {lines:#?}");
    }
    assert!(run.output.contains("TWINSITE_DISKS=root 4096 nbd+unix:///root?socket=/run/x.sock\n"), "{}", run.output);
    // sort put the second disk's line elsewhere.
    assert!(lines.contains(&"data 8192 -"), "{lines:#?}");
    let names = lines.iter().filter_map(|line| line.split_once('=').map(|(name, _)| name));
    let unknown: Vec<&str> = names.filter(|n| !n.starts_with("TWINSITE_") && !["PATH", "HOME", "LANG"].contains(n)).collect();
    assert!(unknown.is_empty(), "{unknown:?}");
    // Whoever started this test may have left it descriptors that all its children have; the node has no other.
    let others = std::process::Command::new("sh").args(["-c", "ls /proc/self/fd | tr '\\n' ' '"]).output().unwrap();
    assert_eq!(&lines[lines.len() - 2..], ["/", &*String::from_utf8_lossy(&others.stdout)], "{lines:#?}");
    assert!(run.outcome == HookOutcome::Succeeded && run.duration_ms.is_some() && run.number == 1);
    assert_eq!(hooks.runs(), [run]);
}

/// Would catch output that is kept whole, the wrong end of it, and a pipe that is not read, in which the hook would hang.
#[test]
fn megabytes_of_output_are_counted_and_the_end_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let (run, _) = ran(folder.path(), "60s", "head -c 5000000 /dev/zero | tr '\\0' x; echo the end; exit 3");
    let error = run.unwrap_err();
    assert!(error.outcome == HookOutcome::Failed { exit_code: 3 }, "{error}");
    assert_eq!(error.output.len(), process::OUTPUT_BYTES_MAX);
    assert!(error.output.ends_with("the end\n"), "the end is what matters");
    let said = error.to_string();
    assert!(said.len() < 600 && said.starts_with("hook pre-failover (") && said.contains("exit code 3; it said: "), "{said}");
    let again = HookRecord::open(folder.path()).runs();
    assert_eq!(again[0].output_bytes_left_out, 5_000_000 + 8 - process::OUTPUT_BYTES_MAX as u64);
}

/// Would catch a limit that ends the hook and not what it started, or one that waits for the pipe.
#[test]
fn a_hook_that_hangs_is_killed_with_all_it_started() {
    let folder = tempfile::tempdir().unwrap();
    let pids = folder.path().join("pids");
    let body = format!("trap '' TERM\nsleep 1000 & echo $! > {0}; echo $$ >> {0}; wait; sleep 1000", pids.display());
    let (run, _) = ran(folder.path(), "3s", &body);
    let error = run.unwrap_err();
    assert_eq!(error.outcome, HookOutcome::TimedOut { limit_ms: 3000 });
    for pid in std::fs::read_to_string(&pids).unwrap().lines() {
        // A killed process may be there for a moment, until init has reaped it.
        let until = std::time::Instant::now() + Duration::from_secs(10);
        let stat = format!("/proc/{pid}/stat");
        while std::fs::read_to_string(&stat).is_ok_and(|s| !s.contains(") Z ")) {
            assert!(std::time::Instant::now() < until, "process {pid} is still there");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Would catch a run that lasts until a process in the background closes the pipe, and one that kills such a process: it may be the server.
#[test]
fn what_a_hook_leaves_running_is_neither_waited_for_nor_killed() {
    let folder = tempfile::tempdir().unwrap();
    let pid = folder.path().join("pid");
    let began = std::time::Instant::now();
    let (run, _) = ran(folder.path(), "60s", &format!("sleep 30 & echo $! > {}; echo done", pid.display()));
    let run = run.unwrap().unwrap();
    assert!(run.output == "done\n" && began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    let left: i32 = std::fs::read_to_string(&pid).unwrap().trim().parse().unwrap();
    let left = rustix::process::Pid::from_raw(left).unwrap();
    assert!(rustix::process::test_kill_process(left).is_ok(), "it goes on");
    rustix::process::kill_process(left, rustix::process::Signal::KILL).unwrap();
}

/// Would catch a program run with the node's rights that somebody else may have written.
#[test]
fn a_file_that_others_may_change_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = script(folder.path(), "hook", "echo ran");
    let mode = |path: &Path, mode| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    let said = |path: &Path| check(path).unwrap_err().to_string();
    assert!(check(&file).is_ok());
    for bad in [0o757, 0o775, 0o777] {
        mode(&file, bad);
        assert!(said(&file).contains(&format!("can be changed by others (mode 0{bad:o})")), "{}", said(&file));
    }
    mode(&file, 0o644);
    assert!(said(&file).contains("is not executable"));
    mode(&file, 0o755);
    // A folder in which others may put another file in its place, also behind a link; the sticky bit keeps them from it.
    let inner = folder.path().join("inner");
    std::fs::create_dir(&inner).unwrap();
    let linked = inner.join("linked");
    std::os::unix::fs::symlink(&file, &linked).unwrap();
    mode(&inner, 0o777);
    assert!(said(&linked).contains("its folder") && said(&linked).contains("mode 0777"), "{}", said(&linked));
    mode(&inner, 0o1777);
    assert!(check(&linked).is_ok());
    assert!(said(&folder.path().join("nonesuch")).contains("is missing"));
    assert!(said(&inner).contains("is not a regular file"));
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(&file, Some(12345), None).unwrap();
        assert!(said(&file).contains("belongs to user 12345"), "{}", said(&file));
    }
    // Refused is told, and recorded as every other run.
    let (run, hooks) = {
        let hooks = hooks(folder.path(), "[hooks]\npost_drill = \"nonesuch\"\n");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        (runtime.block_on(hooks.run(Transition::Drill, Phase::Post, &facts())), hooks)
    };
    assert!(run.unwrap_err().to_string().contains("was not run: it is missing"));
    assert!(matches!(hooks.runs()[0].outcome, HookOutcome::Refused { .. }));
}

/// Would catch an override that is not found, or one that takes the other hooks away.
#[test]
fn a_group_has_its_own_hooks_and_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let text = "[hooks]\npre_failover = \"a\"\npost_failover = \"b\"\n\
                [[hooks.group]]\nname = \"alpha/db\"\npre_failover = \"c\"\n[[hooks.group]]\nname = \"web\"\nfenced = \"d\"\n";
    let config = Config::parse(&folder.path().join("t.toml"), text).unwrap().hooks;
    let find = |hook, client: Option<&str>, group: &str| {
        let client = client.map(|c| c.parse().unwrap());
        let found = config.find(hook, client.as_ref(), &group.parse().unwrap())?;
        Some(found.file_name().unwrap().to_str().unwrap().to_owned())
    };
    let (pre, post) = (Hook::Of(Transition::Failover, Phase::Pre), Hook::Of(Transition::Failover, Phase::Post));
    assert_eq!(find(pre, Some("alpha"), "db").as_deref(), Some("c"));
    assert_eq!(find(post, Some("alpha"), "db").as_deref(), Some("b"));
    assert_eq!(find(pre, Some("gamma"), "db").as_deref(), Some("a"));
    assert_eq!(find(Hook::Fenced, None, "web").as_deref(), Some("d"));
    assert_eq!(find(Hook::Fenced, None, "db"), None);
}

/// Would catch a record that grows for ever, loses numbers, or calls a run that was cut off a success; and one that a damaged file keeps
/// from starting.
#[test]
fn runs_are_kept_across_restarts_and_a_cut_off_one_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let run = HookRun {
        number: 0,
        hook: "fenced".to_owned(),
        client: None,
        group: "db".parse().unwrap(),
        point: None,
        generation: Generation(1),
        path: "/x".into(),
        started_unix_us: 1,
        duration_ms: None,
        outcome: HookOutcome::Running,
        output: String::new(),
        output_bytes_left_out: 0,
    };
    let record = HookRecord::open(folder.path());
    for n in 1..=record::RUNS_MAX as u64 + 3 {
        let begun = record.begun(run.clone());
        assert_eq!(begun.number, n);
        if n % 2 == 0 {
            record.ended(&HookRun { outcome: HookOutcome::Succeeded, duration_ms: Some(5), ..begun });
        }
    }
    let again = HookRecord::open(folder.path());
    let runs = again.runs();
    assert_eq!((runs.len(), runs[0].number), (record::RUNS_MAX, 4));
    assert_eq!((&runs[0].outcome, &runs[1].outcome), (&HookOutcome::Succeeded, &HookOutcome::Interrupted));
    assert_eq!(again.newest(), runs[runs.len() - 1..]);
    let file = folder.path().join("hooks.json");
    std::fs::write(&file, "{").unwrap();
    let damaged = HookRecord::open(folder.path());
    assert_eq!(damaged.begun(run).number, 1);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "{", "left as it is");
}
