//! Two customers of one receiver, each with a group named "db".
//!
//! Would catch: groups that are looked up by name alone, a failover of one that touches the other, a restriction that is not
//! enforced or that ends the whole connection, a stranger who gets past the handshake, an error that only one end tells.

mod support;

use std::path::{Path, PathBuf};
use std::time::Duration;

use support::nbd::Nbd;
use support::node::{COMMIT_WITHIN, Node, free_address, group_config, receiver_config};
use support::{eventually, noise, scratch, sparse, text};

const DISK_BYTES: u64 = 16 << 20;

/// A primary with groups of one disk each, named `data`.
struct Customer {
    node: Node,
}

impl Customer {
    fn new(folder: &Path, name: &str) -> Self {
        Self { node: Node::new(folder, name) }
    }

    fn socket(&self, group: &str) -> PathBuf {
        self.node.folder.join(format!("{group}.sock"))
    }

    fn start(&mut self, peer: &str, peer_key: &str, groups: &[&str]) {
        let mut config = String::new();
        for group in groups {
            let image = self.node.folder.join(format!("{group}.raw"));
            sparse(&image, DISK_BYTES);
            config += &group_config(group, peer, peer_key, "50ms", &[("data", &image, &self.socket(group))]);
        }
        self.node.configure(&config);
        self.node.start();
    }

    fn write(&self, group: &str, content: &[u8]) {
        let mut nbd = Nbd::connect(&self.socket(group), "data").expect("its own export");
        nbd.write(0, content).expect("a write");
        nbd.flush().expect("a flush");
    }
}

fn first_bytes(socket: &Path, bytes: usize) -> Vec<u8> {
    let mut nbd = Nbd::connect(socket, "data").expect("the copy's export");
    nbd.read(0, bytes as u32).expect("a read")
}

/// The lines of a log that hold all of `words`.
fn lines<'l>(log: &'l str, words: &[&str]) -> Vec<&'l str> {
    log.lines().filter(|line| words.iter().all(|word| line.contains(word))).collect()
}

#[test]
fn one_name_two_customers() {
    let folder = scratch();
    let (listen, store) = (free_address(), folder.path().join("store"));
    let mut receiver = Node::new(folder.path(), "receiver");
    let (mut alpha, mut beta) = (Customer::new(folder.path(), "alpha"), Customer::new(folder.path(), "beta"));
    let config = receiver_config(&listen, &store, "alpha", &alpha.node.key());
    let second = format!("\n[[receiver.client]]\nname = \"beta\"\nkey = \"{}\"\n", beta.node.key());
    let key = receiver.key();
    receiver.configure(&(config + &second));
    receiver.start();
    alpha.start(&listen, &key, &["db"]);
    beta.start(&listen, &key, &["db"]);
    let (ours, theirs) = (noise(1, 1 << 20), noise(2, 1 << 20));
    alpha.write("db", &ours);
    beta.write("db", &theirs);
    alpha.node.committed("db");
    let before = beta.node.committed("db");

    // Two owners of a name: the person is asked which.
    for command in [&["points", "db"][..], &["failover", "db", "--export", "unix:x.sock", "--yes"]] {
        let refused = receiver.ask(command);
        let said = text(&refused);
        assert!(!refused.status.success(), "{command:?} must not choose: {said}");
        assert!(said.contains("alpha/db") && said.contains("beta/db"), "{command:?} names the choices: {said}");
        assert_eq!(said.trim().lines().count(), 1, "one line: {said}");
    }

    // One fails over; the other does not notice.
    let socket = folder.path().join("alpha.sock");
    receiver.failover("alpha/db", None, &socket);
    assert_eq!(first_bytes(&socket, ours.len()), ours, "alpha's copy holds alpha's data");
    eventually("alpha is fenced", COMMIT_WITHIN, || (alpha.node.primary("db")["state"] == "fenced").then_some(()));
    let again = noise(3, 1 << 20);
    beta.write("db", &again);
    let after = beta.node.committed("db");
    assert_eq!(after["state"], "streaming", "{after:#}");
    assert_eq!(after["generation"], before["generation"], "the other customer's generation stays");
    let socket = folder.path().join("beta.sock");
    receiver.failover("beta/db", None, &socket);
    assert_eq!(first_bytes(&socket, again.len()), again, "beta's copy holds beta's data");

    // Neither is told that the other exists.
    assert!(!alpha.node.log().contains("beta"), "{}", alpha.node.log());
    assert!(!beta.node.log().contains("alpha"), "{}", beta.node.log());
    for client in ["alpha", "beta"] {
        assert!(store.join(client).join("db").is_dir(), "a folder for each client");
    }
}

#[test]
fn a_restricted_client_is_told_which_group_it_may_not_send() {
    let folder = scratch();
    let (listen, store) = (free_address(), folder.path().join("store"));
    let (mut receiver, mut client) = (Node::new(folder.path(), "receiver"), Customer::new(folder.path(), "gamma"));
    let config = receiver_config(&listen, &store, "gamma", &client.node.key()) + "groups = [\"db\"]\n";
    let key = receiver.key();
    receiver.configure(&config);
    receiver.start();
    client.start(&listen, &key, &["db", "web"]);
    let error =
        eventually("the refusal is shown", COMMIT_WITHIN, || client.node.primary("web")["error"].as_str().map(str::to_owned));
    assert!(error.contains("web") && error.lines().count() == 1, "{error}");
    client.write("db", &noise(4, 1 << 20));
    assert_eq!(client.node.committed("db")["state"], "streaming", "its other group goes on");
    assert!(!store.join("gamma/web").exists(), "nothing is made for a group that is refused");
    eventually("both ends tell it", Duration::from_secs(10), || {
        let (here, there) = (client.node.log(), receiver.log());
        (!lines(&here, &["web", &error]).is_empty() && !lines(&there, &["gamma", "web"]).is_empty()).then_some(())
    });
    println!("client: {error}");
    println!("receiver: {}", lines(&receiver.log(), &["gamma", "web"])[0]);
}

#[test]
fn a_stranger_gets_no_further_than_the_handshake() {
    let folder = scratch();
    let (listen, store) = (free_address(), folder.path().join("store"));
    let mut receiver = Node::new(folder.path(), "receiver");
    let (mut friend, mut stranger) = (Customer::new(folder.path(), "friend"), Customer::new(folder.path(), "stranger"));
    let key = receiver.key();
    receiver.configure(&receiver_config(&listen, &store, "friend", &friend.node.key()));
    receiver.start();
    friend.start(&listen, &key, &["db"]);
    friend.write("db", &noise(5, 1 << 20));
    friend.node.committed("db");
    let unknown = stranger.node.key();
    stranger.start(&listen, &key, &["db"]);
    let error =
        eventually("the stranger is told", COMMIT_WITHIN, || stranger.node.primary("db")["error"].as_str().map(str::to_owned));
    assert!(error.lines().count() == 1, "{error}");
    assert!(error.contains(&unknown), "it says which key has to be listed: {error}");
    let told = eventually("the receiver tells it too", COMMIT_WITHIN, || {
        lines(&receiver.log(), &["127.0.0.1", "not let in"]).first().map(|line| (*line).to_owned())
    });
    println!("stranger: {error}\nreceiver: {told}");
    // Its guest is served all the same, and the friend's group goes on.
    stranger.write("db", &noise(6, 1 << 20));
    friend.write("db", &noise(7, 1 << 20));
    assert_eq!(friend.node.committed("db")["state"], "streaming");
    assert!(stranger.node.primary("db")["committed"].is_null());
    let folders: Vec<_> = std::fs::read_dir(&store).expect("the store").map(|e| e.expect("an entry").file_name()).collect();
    assert!(!folders.iter().any(|name| name == "stranger"), "{folders:?}");
}
