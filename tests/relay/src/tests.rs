//! The relay between real sockets. What a path does to a stream of datagrams is tested in `line`, without a clock.

use std::time::Duration;

use super::*;

#[path = "../../support/stalls.rs"]
#[allow(dead_code, reason = "every test uses a part of it")]
mod stalls;

use stalls::Stalls;

const MS: Duration = Duration::from_millis(1);
/// Nothing on loopback takes this long; a datagram that has not come by then will not.
const WITHIN: Duration = Duration::from_secs(10);

struct Ends {
    relay: Relay,
    client: UdpSocket,
    server: UdpSocket,
}

fn receiving() -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(WITHIN)).unwrap();
    sockopt::set_socket_recv_buffer_size(&socket, SOCKET_BUFFER_BYTES).unwrap();
    socket
}

fn ends(path: Path) -> Ends {
    let server = receiving();
    let relay = Relay::start(server.local_addr().unwrap(), 1).unwrap();
    relay.set_both(path);
    Ends { relay, client: receiving(), server }
}

impl Ends {
    fn send(&self, content: &[u8]) {
        self.client.send_to(content, self.relay.address()).unwrap();
    }

    /// The next datagram at the server: its content and its sender.
    fn at_server(&self) -> (Vec<u8>, SocketAddr) {
        let mut buffer = [0; 2048];
        let (bytes, from) = self.server.recv_from(&mut buffer).expect("a datagram arrives at the server");
        (buffer[..bytes].to_vec(), from)
    }

    fn at_client(&self) -> Vec<u8> {
        let mut buffer = [0; 2048];
        let (bytes, from) = self.client.recv_from(&mut buffer).expect("a datagram arrives at the client");
        assert_eq!(from, self.relay.address());
        buffer[..bytes].to_vec()
    }

    /// Waits until the relay has counted what a test has sent.
    fn counted(&self, direction: Direction, wanted: impl Fn(Counts) -> bool) -> Counts {
        let until = Instant::now() + WITHIN;
        loop {
            let counts = self.relay.counts(direction);
            if wanted(counts) {
                return counts;
            }
            assert!(Instant::now() < until, "{counts:?}");
            std::thread::sleep(MS);
        }
    }
}

/// Would catch a busy process that is taken for a machine that stands still: bounds would hold nothing any more.
#[test]
fn a_busy_machine_is_no_stall() {
    let (stalls, began) = (Stalls::start(), Instant::now());
    let until = began + 1000 * MS;
    // What none of those that keep it busy ran either: this machine may really stand still meanwhile.
    let spin = || {
        let (mut last, mut stood) = (began, Duration::ZERO);
        while last < until {
            let now = Instant::now();
            stood += Some(now - last).filter(|gap| *gap > 5 * MS).unwrap_or_default();
            last = now;
        }
        stood
    };
    let stood: Duration = std::thread::scope(|scope| {
        let busy: Vec<_> = (0..std::thread::available_parallelism().unwrap().get()).map(|_| scope.spawn(spin)).collect();
        busy.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    let counted = stalls.between(began, until);
    println!("{counted:?} of a busy second, in which those who were busy missed {stood:?}");
    assert!(counted < stood + 200 * MS, "{counted:?} of a busy second, {stood:?} were missed");
    // Of what is seen, each moment counts once, whichever processors stood still.
    let at = |ms: u32| began + ms * MS;
    let of = Stalls::of(vec![(at(100), at(300)), (at(200), at(250)), (at(250), at(400)), (at(900), at(1200))]);
    assert_eq!(
        [of.between(at(0), at(2000)), of.between(at(150), at(1000)), of.between(at(500), at(800))],
        [600 * MS, 350 * MS, Duration::ZERO]
    );
}

/// Would catch a delay of one direction only, and datagrams that come early.
#[test]
fn a_round_trip_takes_both_delays() {
    let ends = ends(Path { delay: 30 * MS, ..Path::default() });
    ends.relay.set(Direction::ToClient, Path { delay: 50 * MS, ..Path::default() });
    for _ in 0..5 {
        let (stalls, began) = (Stalls::start(), Instant::now());
        ends.send(b"there");
        let (content, from) = ends.at_server();
        assert_eq!(content, b"there");
        assert!(began.elapsed() >= 30 * MS, "{:?}", began.elapsed());
        ends.server.send_to(b"and back", from).unwrap();
        assert_eq!(ends.at_client(), b"and back");
        let took = began.elapsed();
        assert!(took >= 80 * MS && stalls.ran_since(began) < 2000 * MS, "{took:?}");
    }
    for (direction, bytes) in [(Direction::ToServer, 25), (Direction::ToClient, 40)] {
        let counts = ends.relay.counts(direction);
        let all = Counts { entered: 5, entered_bytes: bytes, delivered: 5, delivered_bytes: bytes, ..Counts::default() };
        assert_eq!(counts, all);
    }
}

/// Would catch datagrams that are lost between the sockets and the model, and a loss that is not counted.
#[test]
fn what_is_lost_is_counted_and_the_rest_arrives() {
    let ends = ends(Path { loss: 0.2, ..Path::default() });
    let mut arrived = 0;
    for n in 0..1000_u32 {
        ends.send(&n.to_le_bytes());
        let counts = ends.counted(Direction::ToServer, |c| c.delivered + c.lost == u64::from(n) + 1);
        if counts.delivered > arrived {
            arrived = counts.delivered;
            assert_eq!(ends.at_server().0, n.to_le_bytes());
        }
    }
    let counts = ends.relay.counts(Direction::ToServer);
    assert_eq!((counts.entered, counts.refused), (1000, 0));
    // Five standard deviations.
    assert!((137..=263).contains(&counts.lost), "{counts:?}");
}

/// Would catch a rate that is not kept with real sockets, and one that does not change while it runs.
#[test]
fn a_rate_is_kept_and_changes_while_it_runs() {
    let ends = ends(Path { rate_bits_per_s: Some(8_000_000), queue_bytes: Some(1 << 20), ..Path::default() });
    let stalls = Stalls::start();
    // With headers 1000 bytes.
    let pass = |count: u32, before: &dyn Fn()| {
        let began = Instant::now();
        (0..count).for_each(|_| ends.send(&[7; 972]));
        before();
        (0..count).for_each(|_| drop(ends.at_server()));
        (began.elapsed(), stalls.ran_since(began))
    };
    let (took, ran) = pass(100, &|| ());
    assert!(took >= 100 * MS && ran < 1000 * MS, "100 of 1 ms each: {took:?}, {ran:?}");
    ends.relay.set(Direction::ToServer, Path { rate_bits_per_s: Some(1_600_000), queue_bytes: Some(1 << 20), ..Path::default() });
    let (took, ran) = pass(40, &|| ());
    assert!(took >= 200 * MS && ran < 1500 * MS, "40 of 5 ms each: {took:?}, {ran:?}");
    ends.relay.set(Direction::ToServer, Path { rate_bits_per_s: Some(80_000), queue_bytes: Some(1 << 20), ..Path::default() });
    let (_, ran) = pass(100, &|| ends.relay.set(Direction::ToServer, Path::default()));
    assert!(ran < 450 * MS, "100 of 100 ms each, but for a limit that is gone: {ran:?}");
}

/// Would catch a cut that leaks, or that does not end.
#[test]
fn nothing_passes_while_it_is_cut() {
    let ends = ends(Path::default());
    ends.send(b"before");
    let (_, from) = ends.at_server();
    ends.relay.cut();
    ends.send(b"lost");
    ends.server.send_to(b"lost", from).unwrap();
    ends.counted(Direction::ToServer, |c| c.cut == 1);
    ends.counted(Direction::ToClient, |c| c.cut == 1);
    ends.relay.restore();
    ends.send(b"after");
    assert_eq!(ends.at_server().0, b"after");
    ends.server.send_to(b"back", from).unwrap();
    assert_eq!(ends.at_client(), b"back");
}

/// Would catch an address that stays, a client that is cut off by the change, and an old port that still works.
#[test]
fn a_rebind_changes_the_address_that_the_server_sees() {
    let ends = ends(Path::default());
    ends.send(b"one");
    let (_, first) = ends.at_server();
    assert_eq!(ends.relay.sources().unwrap(), [first]);
    ends.relay.rebind().unwrap();
    ends.server.send_to(b"to nobody", first).unwrap();
    ends.send(b"two");
    let (_, second) = ends.at_server();
    assert!(second != first && second.ip() == first.ip(), "{first} {second}");
    ends.server.send_to(b"to the client", second).unwrap();
    assert_eq!(ends.at_client(), b"to the client");
    let other = IpAddr::from([127, 0, 0, 2]);
    ends.relay.rebind_at(other).unwrap();
    ends.send(b"three");
    let (_, third) = ends.at_server();
    assert_eq!((third.ip(), ends.relay.sources().unwrap()), (other, vec![third]));
    ends.server.send_to(b"again", third).unwrap();
    assert_eq!(ends.at_client(), b"again");
}

/// Would catch answers that go to the wrong client, and flows without a limit.
#[test]
fn clients_are_told_apart_and_bounded() {
    let ends = ends(Path::default());
    let clients: Vec<_> = (0..CLIENTS_MAX + 1).map(|_| receiving()).collect();
    let mut seen = Vec::new();
    for client in &clients {
        client.send_to(b"hello", ends.relay.address()).unwrap();
        seen.push(ends.at_server().1);
    }
    assert_eq!(ends.relay.sources().unwrap().len(), CLIENTS_MAX);
    for (n, (client, from)) in clients.iter().zip(&seen).enumerate().skip(1) {
        ends.server.send_to(&n.to_le_bytes(), from).unwrap();
        let mut buffer = [0; 16];
        let (bytes, _) = client.recv_from(&mut buffer).expect("its own answer");
        assert_eq!(buffer[..bytes], n.to_le_bytes());
    }
}
