//! `twinsite`: the daemon that joins both roles, and the command line that speaks with it.

#![forbid(unsafe_code)]
#![allow(unreachable_pub, reason = "a binary has no callers outside; pub marks what a module offers to the others")]
#![allow(missing_debug_implementations, reason = "devices and sockets have nothing to show")]

mod api;
mod cli;
mod config;
mod demo;
mod files;
mod hooks;
mod key;
mod nbd;
mod node;
mod script;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
