//! Exports one file over NBD: `nbd_export --file PATH --unix SOCK [--tcp ADDR] [--direct] [--read-only] [--threads N]`.
//! Ends on SIGINT or SIGTERM after the requests in flight.

use std::path::PathBuf;
use std::sync::Arc;

use blockdev::nbd::{Export, ListenAddr, NbdServer, ServerOptions};
use blockdev::{FileDevice, IoThreads, OpenOptions};

type Failure = Box<dyn std::error::Error>;

#[derive(Default)]
struct Args {
    file: Option<PathBuf>,
    listen: Vec<ListenAddr>,
    options: OpenOptions,
    threads: usize,
}

fn parse() -> Result<Args, Failure> {
    let mut args = Args { threads: 2, ..Args::default() };
    let mut rest = std::env::args().skip(1);
    while let Some(key) = rest.next() {
        let mut value = || rest.next().ok_or_else(|| format!("{key}: needs a value"));
        match key.as_str() {
            "--file" => args.file = Some(value()?.into()),
            "--unix" => args.listen.push(ListenAddr::Unix(value()?.into())),
            "--tcp" => args.listen.push(ListenAddr::Tcp(value()?.parse()?)),
            "--threads" => args.threads = value()?.parse()?,
            "--direct" => args.options.direct = true,
            "--read-only" => args.options.read_only = true,
            _ => return Err(format!("{key}: unknown; see the head of this example").into()),
        }
    }
    Ok(args)
}

fn main() -> Result<(), Failure> {
    let args = parse()?;
    let device = Arc::new(FileDevice::open(args.file.ok_or("--file: missing")?, args.options)?);
    let io = IoThreads::new(args.threads)?;
    let mut servers = Vec::new();
    for address in &args.listen {
        let server = NbdServer::bind(address, ServerOptions::default(), &io)?;
        server.add_export(Export::new("disk", device.clone()))?;
        println!("listening on {}", server.address());
        servers.push(server);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        tokio::select! {
            result = tokio::signal::ctrl_c() => result?,
            _ = terminate.recv() => {}
        }
        for server in &servers {
            server.shutdown().await;
        }
        Ok(())
    })
}
