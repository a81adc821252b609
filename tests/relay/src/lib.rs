//! A path between UDP clients and one server: it delays, reorders, loses, limits the rate, is cut and restored, and changes the address
//! that the server sees. All of it may be changed while it runs; nothing in the kernel is configured, and no rights are needed.
//!
//! ```no_run
//! # use std::time::Duration;
//! use relay::{Path, Relay};
//! let relay = Relay::start("127.0.0.1:7447".parse().unwrap(), 1).unwrap();
//! println!("clients connect to {}", relay.address());
//! relay.set_both(Path { delay: Duration::from_millis(40), loss: 0.01, rate_bits_per_s: Some(20_000_000), ..Path::default() });
//! relay.cut();
//! relay.restore();
//! relay.rebind().unwrap();
//! ```
//!
//! One thread moves the datagrams. Each client has a socket of its own towards the server, as behind an address translation, so that a
//! client that connects again is told from the one before.

#![forbid(unsafe_code)]

mod line;

use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Instant;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::sockopt;

use crate::line::Line;
pub use crate::line::{Counts, HEADER_BYTES, Path, UNDER_WAY_BYTES_MAX};

/// Clients at once; a further one takes the place of the one that was silent longest.
pub const CLIENTS_MAX: usize = 64;
/// Largest payload of a UDP datagram.
const DATAGRAM_BYTES_MAX: usize = 65_535;
/// Datagrams taken from a socket before those that are due are delivered.
const BATCH: usize = 32;
/// Bytes asked of the kernel for what comes while the thread is busy.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;

/// Which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From clients to the server.
    ToServer,
    /// From the server to clients.
    ToClient,
}

impl Direction {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::ToServer, Self::ToClient];
}

/// A datagram on its way; `client` is whose it is, or whom it is for.
struct Datagram {
    client: SocketAddr,
    payload: Box<[u8]>,
}

/// A client's socket towards the server.
struct Flow {
    client: SocketAddr,
    upstream: Arc<UdpSocket>,
    used: Instant,
}

struct State {
    lines: [Line<Datagram>; 2],
    flows: Vec<Flow>,
    /// What new sockets towards the server are bound to.
    source: IpAddr,
    stop: bool,
}

struct Shared {
    listen: UdpSocket,
    server: SocketAddr,
    state: Mutex<State>,
    /// Written when the thread has to look at the state.
    wake: OwnedFd,
}

/// A running relay; dropping it ends it.
pub struct Relay {
    shared: Arc<Shared>,
    address: SocketAddr,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Relay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Relay({} to {})", self.address, self.shared.server)
    }
}

impl Relay {
    /// Starts one that changes nothing yet, on a free port of loopback. `seed` decides what is lost and how long jitter is.
    ///
    /// # Errors
    /// If a socket or the thread cannot be made.
    pub fn start(server: SocketAddr, seed: u64) -> io::Result<Self> {
        let loopback = match server {
            SocketAddr::V4(_) => IpAddr::from([127, 0, 0, 1]),
            SocketAddr::V6(_) => IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]),
        };
        let listen = socket(loopback)?;
        let address = listen.local_addr()?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let now = Instant::now();
        let lines = [Line::new(seed, now), Line::new(!seed, now)];
        let state = State { lines, flows: Vec::new(), source: loopback, stop: false };
        let shared = Arc::new(Shared { listen, server, state: Mutex::new(state), wake });
        let worker = Worker { shared: Arc::clone(&shared), buffer: vec![0; DATAGRAM_BYTES_MAX] };
        let thread = std::thread::Builder::new().name("relay".to_owned()).spawn(move || worker.run())?;
        Ok(Self { shared, address, thread: Some(thread) })
    }

    /// Where clients send to.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What a direction is like now.
    #[must_use]
    pub fn path(&self, direction: Direction) -> Path {
        self.shared.state().lines[direction as usize].path()
    }

    /// Changes a direction.
    ///
    /// # Panics
    /// If the loss is not 0 to 1, or the rate is 0.
    pub fn set(&self, direction: Direction, path: Path) {
        path.check();
        self.shared.change(|state| state.lines[direction as usize].set(Instant::now(), path));
    }

    /// Changes both directions.
    ///
    /// # Panics
    /// If the loss is not 0 to 1, or the rate is 0.
    pub fn set_both(&self, path: Path) {
        Direction::BOTH.into_iter().for_each(|direction| self.set(direction, path));
    }

    /// Nothing passes any more; what should arrive meanwhile is lost.
    pub fn cut(&self) {
        self.shared.change(|state| state.lines.iter_mut().for_each(|line| line.set_cut(true)));
    }

    /// Ends a cut.
    pub fn restore(&self) {
        self.shared.change(|state| state.lines.iter_mut().for_each(|line| line.set_cut(false)));
    }

    /// Gives every client another port towards the server. Nothing that the server sends to the old ones arrives, as when an address
    /// translation has forgotten them.
    ///
    /// # Errors
    /// If a socket cannot be made; then nothing has changed.
    pub fn rebind(&self) -> io::Result<()> {
        let source = self.shared.state().source;
        self.rebind_at(source)
    }

    /// The same with another address of this machine, which on loopback may be any of 127.0.0.0/8.
    ///
    /// # Errors
    /// If a socket cannot be made; then nothing has changed.
    pub fn rebind_at(&self, source: IpAddr) -> io::Result<()> {
        self.shared.change(|state| {
            // All are made before one of the old is closed, so that no port is had again.
            let fresh: Vec<_> = state.flows.iter().map(|_| socket(source).map(Arc::new)).collect::<io::Result<_>>()?;
            state.source = source;
            state.flows.iter_mut().zip(fresh).for_each(|(flow, upstream)| flow.upstream = upstream);
            Ok(())
        })
    }

    /// The addresses that the server sees now, of the client that was heard last first.
    ///
    /// # Errors
    /// If a socket does not tell its address.
    pub fn sources(&self) -> io::Result<Vec<SocketAddr>> {
        let mut state = self.shared.state();
        state.flows.sort_by_key(|flow| std::cmp::Reverse(flow.used));
        state.flows.iter().map(|flow| flow.upstream.local_addr()).collect()
    }

    /// What became of a direction's datagrams so far.
    #[must_use]
    pub fn counts(&self, direction: Direction) -> Counts {
        self.shared.state().lines[direction as usize].counts()
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // A poisoned state is that of a thread that has ended by itself.
        if let Ok(mut state) = self.shared.state.lock() {
            state.stop = true;
        }
        self.shared.wake();
        let ended = self.thread.take().map(JoinHandle::join);
        if matches!(ended, Some(Err(_))) && !std::thread::panicking() {
            panic!("the relay failed: its message is above");
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("the relay failed: its message is above")
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let changed = change(&mut self.state());
        self.wake();
        changed
    }

    fn wake(&self) {
        // It fails only when the counter is full, and then the thread is awake anyway.
        let _ = rustix::io::write(&self.wake, &1_u64.to_le_bytes());
    }
}

struct Worker {
    shared: Arc<Shared>,
    buffer: Vec<u8>,
}

impl Worker {
    fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        loop {
            let (upstream, next) = {
                let state = shared.state();
                if state.stop {
                    return;
                }
                let upstream: Vec<_> = state.flows.iter().map(|flow| (flow.client, Arc::clone(&flow.upstream))).collect();
                (upstream, state.lines.iter().filter_map(Line::next).min())
            };
            let polled = wait(&shared, &upstream, next);
            // Held while sockets are read and written, none of which waits.
            let mut state = shared.state();
            let ready = polled.expect("poll on open sockets");
            let mut drained = [0; 8];
            match rustix::io::read(&shared.wake, &mut drained) {
                Ok(_) | Err(rustix::io::Errno::AGAIN) => {}
                Err(error) => panic!("the relay's eventfd: {error}"),
            }
            if ready[0] {
                self.take(&shared.listen, |from| Some((Direction::ToServer, from)), &mut state);
            }
            for ((client, socket), ready) in upstream.iter().zip(&ready[1..]) {
                // One that was replaced meanwhile is not heard any more.
                let current = state.flows.iter().any(|flow| Arc::ptr_eq(&flow.upstream, socket));
                if *ready && current {
                    let server = shared.server;
                    self.take(socket, |from| (from == server).then_some((Direction::ToClient, *client)), &mut state);
                }
            }
            deliver(&shared, &mut state);
        }
    }

    /// Takes what a socket has; `accept` says whose it is.
    fn take(&mut self, socket: &UdpSocket, accept: impl Fn(SocketAddr) -> Option<(Direction, SocketAddr)>, state: &mut State) {
        for _ in 0..BATCH {
            let (bytes, from) = match socket.recv_from(&mut self.buffer) {
                Ok(received) => received,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => panic!("the relay's UDP socket cannot be read: {error}"),
            };
            let Some((direction, client)) = accept(from) else { continue };
            let payload = self.buffer[..bytes].into();
            state.lines[direction as usize].push(Instant::now(), bytes, Datagram { client, payload });
        }
    }
}

/// Waits until a socket has something, something is due, or somebody calls. Tells which sockets have something: the clients' first.
fn wait(shared: &Shared, upstream: &[(SocketAddr, Arc<UdpSocket>)], next: Option<Instant>) -> io::Result<Vec<bool>> {
    let mut polled = Vec::with_capacity(upstream.len() + 2);
    polled.push(PollFd::new(&shared.wake, PollFlags::IN));
    polled.push(PollFd::new(&shared.listen, PollFlags::IN));
    polled.extend(upstream.iter().map(|(_, socket)| PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::IN)));
    let left = next.map(|next| next.saturating_duration_since(Instant::now()));
    let timeout = left.map(Timespec::try_from).transpose().map_err(io::Error::other)?;
    match poll(&mut polled, timeout.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(polled[1..].iter().map(|p| !p.revents().is_empty()).collect()),
        Err(error) => Err(error.into()),
    }
}

fn deliver(shared: &Shared, state: &mut State) {
    let now = Instant::now();
    while let Some(datagram) = state.lines[Direction::ToServer as usize].pop(now) {
        let sent = upstream_of(state, datagram.client, now).and_then(|socket| socket.send_to(&datagram.payload, shared.server));
        if sent.is_err() {
            state.lines[Direction::ToServer as usize].refused();
        }
    }
    while let Some(datagram) = state.lines[Direction::ToClient as usize].pop(now) {
        if shared.listen.send_to(&datagram.payload, datagram.client).is_err() {
            state.lines[Direction::ToClient as usize].refused();
        }
    }
}

/// The client's socket towards the server, made at its first datagram.
fn upstream_of(state: &mut State, client: SocketAddr, now: Instant) -> io::Result<Arc<UdpSocket>> {
    if let Some(flow) = state.flows.iter_mut().find(|flow| flow.client == client) {
        flow.used = now;
        return Ok(Arc::clone(&flow.upstream));
    }
    let upstream = Arc::new(socket(state.source)?);
    if state.flows.len() >= CLIENTS_MAX {
        let silent = state.flows.iter().enumerate().min_by_key(|(_, flow)| flow.used).map(|(at, _)| at);
        if let Some(at) = silent {
            state.flows.swap_remove(at);
        }
    }
    state.flows.push(Flow { client, upstream: Arc::clone(&upstream), used: now });
    Ok(upstream)
}

/// A socket that does not wait. What it may buffer is enlarged beyond the system's limit where that is allowed.
fn socket(source: IpAddr) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((source, 0))?;
    socket.set_nonblocking(true)?;
    sockopt::set_socket_recv_buffer_size_force(&socket, SOCKET_BUFFER_BYTES)
        .or_else(|_| sockopt::set_socket_recv_buffer_size(&socket, SOCKET_BUFFER_BYTES))?;
    sockopt::set_socket_send_buffer_size_force(&socket, SOCKET_BUFFER_BYTES)
        .or_else(|_| sockopt::set_socket_send_buffer_size(&socket, SOCKET_BUFFER_BYTES))?;
    Ok(socket)
}

#[cfg(test)]
mod tests;
