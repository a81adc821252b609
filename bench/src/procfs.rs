//! What the kernel says of a process: CPU time, peak memory.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

/// CPU time of a process, its threads and its ended children.
///
/// Fields 14 to 17 of `/proc/PID/stat` (utime, stime, cutime, cstime), see proc(5). The name in field 2 may hold anything, also
/// parentheses and blanks, so counting starts after the last `)`.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let fields: Vec<&str> = stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace().collect();
    // Field 3 is the first here.
    fields.get(11..15)?.iter().map(|f| f.parse::<u64>().ok()).sum()
}

/// Peak resident memory (VmHWM) in bytes from `/proc/PID/status`.
fn peak_bytes(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// CPU time used by `pid` so far.
pub(crate) fn cpu(pid: u32) -> Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let stat = fs::read_to_string(&path).with_context(|| format!("{path}: cannot read the CPU time: has the process ended?"))?;
    let ticks = cpu_ticks(&stat).with_context(|| format!("{path}: not as proc(5) says"))?;
    Ok(Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64))
}

/// Most memory `pid` ever had resident, in bytes.
pub(crate) fn peak_resident(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).with_context(|| format!("{path}: cannot read the memory: has the process ended?"))?;
    peak_bytes(&status).with_context(|| format!("{path}: no VmHWM line"))
}

/// Bytes that `pid` has had written to a disk so far: `write_bytes` of `/proc/PID/io`, see proc(5).
pub(crate) fn written(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/io");
    let io =
        fs::read_to_string(&path).with_context(|| format!("{path}: cannot read what was written: has the process ended?"))?;
    written_bytes(&io).with_context(|| format!("{path}: no write_bytes line"))
}

fn written_bytes(io: &str) -> Option<u64> {
    io.lines().find_map(|l| l.strip_prefix("write_bytes:"))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let stat = "77 (a b) (c) S 1 2 3 4 5 6 7 8 9 10 100 20 3 4 20 0 5 0 99 1000 10";
        assert_eq!(cpu_ticks(stat), Some(127));
        assert_eq!(cpu_ticks("77 (x) S 1 2"), None);
        assert_eq!(cpu_ticks(""), None);
    }

    #[test]
    fn peak_memory_is_in_bytes() {
        assert_eq!(peak_bytes("Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t 1 kB\n"), Some(2 << 20));
        assert_eq!(peak_bytes("Name:\tx\n"), None);
    }
}
