//! Peak resident memory of both roles while a 1 TiB disk is written at random.

use std::time::Duration;

use anyhow::Result;
use serde_json::json;

use super::failover::{DISK_BYTES, SCATTERED};
use crate::chart::{Bar, Chart, Panel};
use crate::context::Bench;
use crate::node::{self, Queue};
use crate::report::{Check, Report, Table, whole};
use crate::{disk, fio, procfs, tools};

const SETTLE_MAX: Duration = Duration::from_secs(600);
/// The bound without the buffers, in MiB.
const BOUND_MIB: f64 = 128.0;

pub(crate) fn run(bench: &Bench) -> Result<Report> {
    let needed = vec![tools::FIO];
    tools::require(&needed)?;
    let seconds = bench.seconds(10, 60);
    let file = bench.path("disk.raw");
    disk::sparse(&file, DISK_BYTES)?;
    let (receiver, primary) = node::pair_of_one(bench, "m", &file, "1s")?;
    let receiving = receiver.start(bench)?;
    let mut sending = primary.start(bench)?;
    primary.settle(&mut sending, SETTLE_MAX)?;
    eprintln!("memory: {seconds} s of random writes");
    let idle = [procfs::peak_resident(sending.pid())?, procfs::peak_resident(receiving.pid())?];
    // A client's queues are there only while it is connected.
    let mut buffers = [Vec::new(), Vec::new()];
    let mut looks = 0_u32;
    let outcome = fio::run_watched(bench, &primary.socket(), &SCATTERED, fio::Span { seconds, seed: 1 }, &mut || {
        looks += 1;
        if looks.is_multiple_of(50) {
            buffers = [primary.buffers()?, receiver.buffers()?];
        }
        Ok(())
    })?;
    primary.settle(&mut sending, SETTLE_MAX)?;
    let peak = [procfs::peak_resident(sending.pid())?, procfs::peak_resident(receiving.pid())?];
    let status = primary.status()?;
    let head = ["process", "peak MiB", "peak before the load MiB", "buffers MiB", "allowed MiB"];
    let mut table =
        Table::new(format!("after {} writes, {} epochs", whole(outcome.bytes / 4096.0), status.epochs_committed), &head);
    let mut queues = Table::new("buffers that status shows", &["process and queue", "limit MiB"]);
    let (mut bars, mut checks, mut results) = (Vec::new(), Vec::new(), Vec::new());
    for (((role, peak), idle), buffers) in ["primary", "receiver"].into_iter().zip(peak).zip(idle).zip(&buffers) {
        let (peak, idle, buffered) = (mib(peak), mib(idle), mib(buffers.iter().map(|q| q.limit).sum()));
        for Queue { name, limit, .. } in buffers {
            queues.row(vec![format!("{role}: {name}"), format!("{:.1}", mib(*limit))]);
        }
        let allowed = BOUND_MIB + buffered;
        table.row([peak, idle, buffered, allowed].iter().map(|v| format!("{v:.1}")).fold(
            vec![role.to_owned()],
            |mut row, cell| {
                row.push(cell);
                row
            },
        ));
        let what = format!("{role}: peak resident memory ({BOUND_MIB} MiB and {buffered:.1} MiB of buffers)");
        checks.push(Check::at_most(what, peak, allowed, "MiB"));
        bars.push(Bar { label: role.to_owned(), value: peak, ours: true });
        results.push(json!({ "role": role, "peak_mib": peak, "before_mib": idle, "buffers": buffers, "allowed_mib": allowed }));
    }
    drop(sending);
    drop(receiving);
    Ok(Report {
        name: "memory",
        title: format!("peak resident memory, {seconds} s of random writes over 1 TiB"),
        parameters: json!({ "seconds": seconds, "disk_bytes": DISK_BYTES, "interval": "1s", "writes": outcome.bytes / 4096.0 }),
        results: json!(results),
        tables: vec![table, queues],
        checks,
        chart: Chart {
            title: "Peak resident memory while a 1 TiB disk is written at random".to_owned(),
            panels: vec![Panel {
                title: "Peak".to_owned(),
                axis: "MiB (buffers come on top of the bound)".to_owned(),
                bars,
                bound: Some(BOUND_MIB),
            }],
        },
        tools: needed,
    })
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
