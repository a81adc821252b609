//! Which tools an experiment needs, which Debian package has each, and which version was used.

use std::env;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Result, bail};

/// Folders searched besides `PATH`: an ordinary user's `PATH` lacks them.
const MORE_FOLDERS: &[&str] = &["/usr/sbin", "/sbin", "/usr/lib/postgresql/15/bin"];

/// A program of a peer or of the test bench.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tool {
    pub(crate) program: &'static str,
    package: &'static str,
}

pub(crate) const FIO: Tool = Tool { program: "fio", package: "fio" };
pub(crate) const QEMU_NBD: Tool = Tool { program: "qemu-nbd", package: "qemu-utils" };
pub(crate) const QEMU_STORAGE_DAEMON: Tool = Tool { program: "qemu-storage-daemon", package: "qemu-system-common" };
pub(crate) const NBDKIT: Tool = Tool { program: "nbdkit", package: "nbdkit" };

pub(crate) const NBDFUSE: Tool = Tool { program: "nbdfuse", package: "libnbd-bin" };
pub(crate) const CP: Tool = Tool { program: "cp", package: "coreutils" };
pub(crate) const LOSETUP: Tool = Tool { program: "losetup", package: "mount" };
pub(crate) const MKFS_EXT4: Tool = Tool { program: "mkfs.ext4", package: "e2fsprogs" };
pub(crate) const POSTGRES: Tool = Tool { program: "postgres", package: "postgresql-15" };
pub(crate) const PGBENCH: Tool = Tool { program: "pgbench", package: "postgresql-15" };

/// Where `program` is.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).chain(MORE_FOLDERS.iter().map(PathBuf::from)).map(|f| f.join(program)).find(|p| p.is_file())
}

/// One line that names every Debian package that is missing.
pub(crate) fn require(tools: &[Tool]) -> Result<()> {
    let missing: Vec<&Tool> = tools.iter().filter(|t| find(t.program).is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = missing.iter().map(|t| t.program).collect();
    let mut packages: Vec<&str> = missing.iter().map(|t| t.package).collect();
    packages.sort_unstable();
    packages.dedup();
    bail!("{}: not found: run apt-get install {}", names.join(", "), packages.join(" "));
}

/// First line of `program --version`, for the results.
pub(crate) fn version(tool: Tool) -> String {
    let Some(program) = find(tool.program) else { return "not installed".to_owned() };
    let output = Command::new(program)
        .arg(if tool.program.starts_with("mkfs") { "-V" } else { "--version" })
        .stdin(Stdio::null())
        .output();
    // mkfs writes it to the other one.
    let text = output.map(|o| String::from_utf8_lossy(&[o.stdout, o.stderr].concat()).into_owned()).unwrap_or_default();
    text.lines().next().unwrap_or("unknown").trim().to_owned()
}
