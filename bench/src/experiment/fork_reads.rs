//! Reads of an activated copy, fresh and flattened, against the raw file that it is a copy of; both over NBD, one after the other in
//! turn. The old primary goes on to serve its own disk.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;
use serde_json::json;

use crate::chart::{Bar, Chart, Panel};
use crate::context::Bench;
use crate::disk::{self, Content};
use crate::fio::{self, Load, Span};
use crate::report::{Check, Report, Table, whole};
use crate::stats::median;
use crate::{child, node, tools};

const LOADS: [Load; 2] = [
    Load {
        title: "4 KiB random read, depth 32",
        rw: "randread",
        bs: "4k",
        iodepth: 32,
        bandwidth: false,
        more: &["--norandommap"],
    },
    Load { title: "1 MiB sequential read, depth 4", rw: "read", bs: "1M", iodepth: 4, bandwidth: true, more: &[] },
];
const SETTLE_MAX: Duration = Duration::from_secs(300);
const FLAT_MAX: Duration = Duration::from_secs(600);
/// Bounds of the goals: a fresh fork, a flattened one.
const STATES: [(&str, f64); 2] = [("fresh", 0.6), ("flattened", 0.95)];

#[derive(Debug, Serialize)]
struct Sample {
    state: &'static str,
    load: &'static str,
    raw: f64,
    copy: f64,
}

pub(crate) fn run(bench: &Bench) -> Result<Report> {
    let needed = vec![tools::FIO];
    tools::require(&needed)?;
    let (rounds, seconds, bytes) = (bench.rounds(3, 5), bench.seconds(2, 5), bench.bytes(512 << 20, 1 << 30));
    let name = bench.fresh("k");
    let file = bench.path(&format!("{name}.raw"));
    disk::fill(&file, bytes, Content::Half)?;
    let (mut receiver, primary) = node::pair_of_one(bench, &name, &file, "1s")?;
    receiver.flatten(false)?;
    let receiving = receiver.start(bench)?;
    let mut daemon = primary.start(bench)?;
    primary.settle(&mut daemon, SETTLE_MAX)?;
    let socket = bench.path(&format!("{name}.sock"));
    child::run(bench, "failover", receiver.failover(&primary, &socket), SETTLE_MAX)?;
    let mut samples = Vec::new();
    let measure = |state, samples: &mut Vec<Sample>| -> Result<()> {
        for round in 0..rounds {
            for load in &LOADS {
                eprintln!("fork-reads: {state}, round {} of {rounds}, {}", round + 1, load.title);
                let of = |socket: &Path| -> Result<f64> {
                    let span = Span { seconds, seed: round as usize + 1 };
                    fio::warm_up(bench, socket, load, span)?;
                    Ok(fio::run(bench, socket, load, span)?.figure(load))
                };
                samples.push(Sample { state, load: load.title, raw: of(&primary.socket())?, copy: of(&socket)? });
            }
        }
        Ok(())
    };
    measure("fresh", &mut samples)?;
    receiving.stop()?;
    receiver.flatten(true)?;
    let mut receiving = receiver.start(bench)?;
    receiving.wait_until("has flattened the copy", FLAT_MAX, || receiver.is_flat())?;
    measure("flattened", &mut samples)?;
    daemon.stop()?;
    receiving.stop()?;
    Ok(report(&samples, (rounds, seconds, bytes), needed))
}

fn report(samples: &[Sample], (rounds, seconds, bytes): (u32, u32, u64), tools: Vec<tools::Tool>) -> Report {
    let mut table = Table::new("reads (medians)", &["copy", "load", "raw file", "copy", "unit", "copy / raw file"]);
    let (mut checks, mut panels) = (Vec::new(), Vec::new());
    for load in &LOADS {
        let mut bars = Vec::new();
        for (state, bound) in STATES {
            let of = |pick: fn(&Sample) -> f64| {
                let ours = samples.iter().filter(|s| s.state == state && s.load == load.title);
                median(&ours.map(pick).collect::<Vec<_>>())
            };
            let (raw, copy, share) = (of(|s| s.raw), of(|s| s.copy), of(|s| s.copy / s.raw));
            let (state_title, unit) = (state.to_owned(), load.unit().to_owned());
            table.row(vec![state_title, load.title.to_owned(), whole(raw), whole(copy), unit, format!("{share:.2}")]);
            checks.push(Check::at_least(format!("{state} copy against the raw file, {}", load.title), share, bound, ""));
            bars.push(Bar { label: format!("raw file, beside the {state} copy"), value: raw, ours: false });
            bars.push(Bar { label: format!("{state} copy"), value: copy, ours: true });
        }
        panels.push(Panel { title: load.title.to_owned(), axis: load.unit().to_owned(), bars, bound: None });
    }
    Report {
        name: "fork-reads",
        title: "reads of an activated copy against the raw file".to_owned(),
        parameters: json!({ "rounds": rounds, "seconds": seconds, "disk_bytes": bytes }),
        results: json!(samples),
        tables: vec![table],
        checks,
        chart: Chart { title: "Reads of an activated copy".to_owned(), panels },
        tools,
    }
}
