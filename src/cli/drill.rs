//! `twinsite drill`: begins a drill, runs a script on one, lists them, ends them, shows what they found.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::bail;
use clap::{ArgGroup, Args, Subcommand};
use proto::{Name, Point};

use super::human::{self, Paint};
use super::{Control, Usage, client};
use crate::api::{
    DrillEnd, DrillEnded, DrillHold, DrillList, DrillOutcome, DrillRequest, DrillResult, DrillResults, DrillStarted,
};
use crate::config::{DRILL_TIMEOUT_DEFAULT, export_address, units};
use crate::node::{drill_environment, drill_report};
use crate::script::{self, End, Script};

/// Results shown unless all are asked for.
const SHOWN: usize = 20;

/// `twinsite drill …`.
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
#[command(group(ArgGroup::new("how").args(["export", "run"]).required(true)))]
pub(crate) struct DrillArgs {
    #[command(subcommand)]
    command: Option<DrillCommand>,
    /// GROUP, or CLIENT/GROUP (needed for a group named list, end or results)
    #[arg(required = true)]
    group: Option<String>,
    /// Try this point, not the newest: GENERATION.EPOCH, or a name of one
    #[arg(long, value_name = "POINT", value_parser = super::point)]
    point: Option<String>,
    /// Try this kept fork (see twinsite forks)
    #[arg(long, conflicts_with = "point")]
    fork: Option<Name>,
    /// Where the disks are served: unix:PATH or tcp:IP:PORT
    #[arg(long, value_name = "ADDRESS")]
    export: Option<String>,
    /// Run this script on the drill, keep what it found on the point, and throw the drill away
    #[arg(long, value_name = "SCRIPT")]
    run: Option<PathBuf>,
    /// End the script after this time
    #[arg(long, value_name = "TIME", value_parser = units::timeout_argument, requires = "run", default_value = "10min")]
    timeout: Duration,
    /// The drill's name, drill- is put before it (default: drill-1, drill-2, …)
    #[arg(long)]
    name: Option<String>,
    /// What its writes may take (default: drill_space_max of the configuration)
    #[arg(long, value_name = "SIZE", value_parser = units::size_argument)]
    space: Option<u64>,
    /// Go on if the hook before it fails
    #[arg(long)]
    ignore_hooks: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    at: Control,
}

#[derive(Subcommand)]
enum DrillCommand {
    /// List the drills that run
    #[command(after_help = "\
Examples:
  twinsite drill list
  twinsite drill list --json")]
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        at: Control,
    },
    /// End drills: their clients are disconnected, what was written to them is thrown away
    #[command(after_help = "\
Examples:
  twinsite drill end drill-1
  twinsite drill end drill-1 drill-2")]
    End {
        /// Names
        #[arg(required = true)]
        names: Vec<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        at: Control,
    },
    /// Show what scripts found on the points of a group
    #[command(after_help = "\
Examples:
  twinsite drill results db
  twinsite drill results db --output      with the end of what each script printed
  twinsite drill results db --json")]
    Results {
        /// GROUP, or CLIENT/GROUP
        group: String,
        /// All of them, not only the newest
        #[arg(long)]
        all: bool,
        /// With the end of what each script printed
        #[arg(long)]
        output: bool,
        /// Print JSON (always all, with output)
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        at: Control,
    },
}

impl DrillArgs {
    /// Where the node is that is asked.
    pub(crate) fn control(&self) -> &Control {
        match &self.command {
            None => &self.at,
            Some(DrillCommand::List { at, .. } | DrillCommand::End { at, .. } | DrillCommand::Results { at, .. }) => at,
        }
    }
}

pub(crate) fn run(socket: &Path, args: DrillArgs) -> anyhow::Result<()> {
    match args.command {
        Some(DrillCommand::List { json, .. }) => list(socket, json),
        Some(DrillCommand::End { names, json, .. }) => end(socket, &names, json),
        Some(DrillCommand::Results { group, all, output, json, .. }) => results(socket, &group, (all, output, json)),
        None => begin(socket, args),
    }
}

fn begin(socket: &Path, args: DrillArgs) -> anyhow::Result<()> {
    // Relative to where the user stands, not to the daemon's folder.
    let here = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
    let export = args.export.as_deref().map(|given| {
        let address = export_address(&here, given).map_err(|problem| Usage(format!("--export '{given}' {problem}")))?;
        Ok::<_, Usage>(address.to_string())
    });
    let script = args.run.map(|path| here.join(path));
    if let Some(script) = &script {
        script::check(script).map_err(|problem| Usage(format!("--run {} {problem}", script.display())))?;
    }
    let request = DrillRequest {
        group: args.group.unwrap_or_default(),
        point: args.point,
        fork: args.fork,
        name: args.name,
        export: export.transpose()?,
        space_max_bytes: args.space,
        script: script.as_ref().map(|script| script.display().to_string()),
        ignore_hooks: args.ignore_hooks,
        read_only: false,
    };
    // The hook before it has a limit of its own, which only the node knows.
    let started: DrillStarted = client::wait(socket, "/v1/drill", &request)?;
    match script {
        Some(script) => run_script(socket, &started, script, args.timeout, args.json),
        None if args.json => Ok(writeln!(std::io::stdout(), "{}", serde_json::to_string_pretty(&started)?)?),
        None => Ok(std::io::stdout().write_all(described(&started).as_bytes())?),
    }
}

fn described(drill: &DrillStarted) -> String {
    let age = human::ms(human::age_ms(drill.cut_unix_us));
    let mut out = format!(
        "Drill {} of group {}/{}: {}, cut {age} ago, after {}.\n",
        drill.name,
        drill.client,
        drill.group,
        what(drill.point, drill.fork.as_ref()),
        human::ms(drill.took_ms)
    );
    for volume in &drill.volumes {
        let uri = crate::api::nbd_uri(&drill.export, volume.name.as_str());
        out += &format!("  {}  {uri}\n", human::padded(volume.name.as_str(), 12));
    }
    let space = human::bytes(drill.space_max_bytes);
    out + &format!("Writes may take {space}. Replication goes on. Throw it away: twinsite drill end {}\n", drill.name)
}

/// `point 3.18211`, or `fork diverged-3 of point 3.18211`.
pub(crate) fn what(point: Point, fork: Option<&Name>) -> String {
    fork.map_or_else(|| format!("point {point}"), |fork| format!("fork {fork} of point {point}"))
}

/// Keeps a drill as long as this process lives; `gone` is set if the drill ends before.
pub(crate) fn hold(socket: &Path, drill: &DrillStarted, gone: &Arc<AtomicBool>) -> anyhow::Result<()> {
    let hold = DrillHold { name: drill.name.clone(), serial: drill.serial };
    let (socket, gone) = (socket.to_path_buf(), Arc::clone(gone));
    std::thread::Builder::new().name("hold".to_owned()).spawn(move || {
        if let Err(error) = client::wait::<DrillEnded>(&socket, "/v1/drill/hold", &hold) {
            tracing::debug!(%error, "the drill is not held any more");
        }
        gone.store(true, Ordering::Relaxed);
    })?;
    Ok(())
}

fn run_script(socket: &Path, drill: &DrillStarted, path: PathBuf, timeout: Duration, json: bool) -> anyhow::Result<()> {
    let gone = Arc::new(AtomicBool::new(false));
    hold(socket, drill, &gone)?;
    super::interrupt::cancels(&gone)?;
    let of = format!("group {}/{}, {}", drill.client, drill.group, what(drill.point, drill.fork.as_ref()));
    if !json {
        eprintln!("drill {} of {of}: running {}", drill.name, path.display());
    }
    let run = Script { path, env: drill_environment(drill, timeout), timeout, user: None, folder: None };
    let ended = script::run(&run, &gone, move |bytes| {
        if !json {
            // Nothing depends on its being seen.
            let _ = std::io::stderr().write_all(bytes);
        }
    });
    let report = drill_report(&ended);
    let cancelled = ended.end == End::Cancelled;
    let end = DrillEnd { name: drill.name.clone(), serial: Some(drill.serial), report };
    let done = client::post::<DrillEnded>(socket, "/v1/drill/end", &end);
    if cancelled {
        bail!("drill {}: interrupted, or ended by somebody else: nothing was recorded, the drill is thrown away", drill.name);
    }
    let done = done?;
    let Some(result) = &done.result else { bail!("drill {}: the node kept no result", drill.name) };
    if json {
        writeln!(std::io::stdout(), "{}", serde_json::to_string_pretty(&done)?)?;
    } else {
        let verdict = verdict(result, Paint::stdout());
        let told = if done.recorded { "" } else { " (not kept: it is not of the point)" };
        writeln!(std::io::stdout(), "{of}: {verdict}{told}")?;
    }
    if !result.passed() {
        bail!("{of}: the drill did not pass: {}", in_words(result));
    }
    Ok(())
}

/// `verified 03:12, boots, 41 s`; the time is this machine's.
pub(crate) fn verdict(result: &DrillResult, paint: Paint) -> String {
    match result.passed() {
        true => paint.good(&format!("verified {}", in_words(result))),
        false => paint.bad(&format!("FAILED {}", in_words(result))),
    }
}

fn in_words(result: &DrillResult) -> String {
    let how = match result.outcome {
        DrillOutcome::Passed => None,
        DrillOutcome::Failed { code } => Some(format!("exit code {code}")),
        DrillOutcome::Killed { signal } => Some(format!("killed by signal {signal}")),
        DrillOutcome::TimedOut => Some("too slow".to_owned()),
        DrillOutcome::NotRun => Some("not run".to_owned()),
    };
    let remark = Some(human::sanitised(&result.remark)).filter(|remark| !remark.is_empty());
    let parts = [Some(human::local(result.began_unix_us)), how, remark, Some(human::ms(result.took_ms))];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

fn list(socket: &Path, json: bool) -> anyhow::Result<()> {
    let list: DrillList = client::get(socket, "/v1/drills")?;
    let mut out = std::io::stdout().lock();
    if json {
        return Ok(writeln!(out, "{}", serde_json::to_string_pretty(&list)?)?);
    }
    if list.drills.is_empty() {
        return Ok(writeln!(out, "no drills")?);
    }
    let mut rows = vec![["NAME", "GROUP", "POINT", ">AGE", ">SPACE", "AT"].map(str::to_owned).to_vec()];
    for d in &list.drills {
        let space = match d.read_only {
            true => "read only".to_owned(),
            false => format!("{} of {}", human::bytes(d.space_used_bytes), human::bytes(d.space_max_bytes)),
        };
        rows.push(vec![
            d.name.clone(),
            format!("{}/{}", d.client, d.group),
            match (d.point, &d.fork) {
                (Some(point), None) => point.to_string(),
                (Some(point), Some(fork)) => format!("{point} {fork}"),
                (None, _) => "-".to_owned(),
            },
            human::ms(human::age_ms(d.began_unix_us)),
            space,
            d.script.clone().or_else(|| d.export.clone()).map_or_else(|| "is being made".to_owned(), |at| human::sanitised(&at)),
        ]);
    }
    Ok(out.write_all(human::table(&rows).as_bytes())?)
}

fn end(socket: &Path, names: &[String], json: bool) -> anyhow::Result<()> {
    for name in names {
        let end = DrillEnd { name: name.clone(), serial: None, report: None };
        let ended: DrillEnded = client::post(socket, "/v1/drill/end", &end)?;
        let text = if json { serde_json::to_string(&ended)? } else { format!("{}: thrown away", ended.name) };
        writeln!(std::io::stdout(), "{text}")?;
    }
    Ok(())
}

fn results(socket: &Path, group: &str, (all, output, json): (bool, bool, bool)) -> anyhow::Result<()> {
    let found: DrillResults = client::get(socket, &format!("/v1/drill/results?group={}", client::encoded(group)))?;
    let mut out = std::io::stdout().lock();
    if json {
        return Ok(writeln!(out, "{}", serde_json::to_string_pretty(&found)?)?);
    }
    if found.results.is_empty() {
        let name = format!("{}/{}", found.client, found.group);
        return Ok(writeln!(out, "group {name}: no drill with a script yet: twinsite drill {name} --run SCRIPT")?);
    }
    let skipped = if all { 0 } else { found.results.len().saturating_sub(SHOWN) };
    if skipped > 0 {
        writeln!(out, "{skipped} older results not shown; --all shows them")?;
    }
    let paint = Paint::stdout();
    for result in found.results.iter().skip(skipped) {
        let script = human::sanitised(&result.script);
        let by = if result.scheduled { ", by the schedule" } else { "" };
        writeln!(out, "{}  {}  {script}{by}", human::padded(&result.point.to_string(), 10), verdict(result, paint))?;
        if output {
            result.output.lines().try_for_each(|line| writeln!(out, "    {}", human::sanitised(line)))?;
        }
    }
    Ok(())
}

/// The default of `--timeout`, which clap wants as text, is that of the configuration.
const _: () = assert!(DRILL_TIMEOUT_DEFAULT.as_secs() == 600);
