//! What a seed is: the group, the content of its disks, and the path between the sites.

use std::time::Duration;

use proto::{BLOCK_BYTES, Name};
use rand::Rng;
use rand::rngs::SmallRng;
use replicator::Durability;

use crate::link::Path;
use crate::primary::PrimaryConfig;

/// One seed in so many has flushes that wait for the receiver.
const SEEDS_A_FLUSH_SYNC: u64 = 3;
/// One seed in so many has the whole life of a server.
const SEEDS_A_LIFE: u64 = 4;
/// What a connection carries besides the blocks of an epoch that holds everything: greetings, hashes, headers.
const OVERHEAD_BYTES: u64 = 32 << 10;

pub(crate) const GROUP: &str = "db";

/// See the module.
pub(crate) struct Plan {
    pub(crate) config: PrimaryConfig,
    /// Content of the disks at first.
    pub(crate) disks: Vec<Vec<u8>>,
    pub(crate) path: Path,
    /// What the guest writes cannot be compressed.
    pub(crate) is_noise: bool,
    /// Whether anything fails but the path.
    pub(crate) faults: bool,
    /// Whether the group is promoted, given back and rolled back again and again.
    pub(crate) lives: bool,
}

/// Whether a seed has the whole life of a server: promotions, failbacks, switchovers, rollbacks.
#[must_use]
pub fn has_life(seed: u64) -> bool {
    seed % SEEDS_A_LIFE == SEEDS_A_LIFE - 1
}

pub(crate) fn name(text: &str) -> Name {
    text.parse().expect("a name")
}

/// Blocks, half of them zero.
fn content(bytes: u64, is_noise: bool, rng: &mut SmallRng) -> Vec<u8> {
    let mut content = vec![0; bytes as usize];
    for block in content.chunks_mut(BLOCK_BYTES as usize) {
        match rng.random_bool(0.5) {
            false => {}
            true if is_noise => rng.fill(block),
            true => block.fill(0x5a),
        }
    }
    content
}

fn config(sizes: &[u64], durability: Durability, rng: &mut SmallRng) -> PrimaryConfig {
    PrimaryConfig {
        group: name(GROUP),
        volumes: (0..sizes.len()).map(|i| name(&format!("disk{i}"))).collect(),
        interval: Duration::from_millis(*[10, 100, 1000].get(rng.random_range(0..3)).unwrap_or(&10)),
        freeze_budget_bytes: rng.random_range(1..30) * BLOCK_BYTES,
        spill_limit_bytes: rng.random_range(0..3) * 16 * BLOCK_BYTES,
        epochs_in_flight: rng.random_range(1..5),
        durability,
    }
}

/// Half of the paths are as good as can be.
fn path(interval: Duration, volume_bytes: u64, rng: &mut SmallRng) -> Path {
    let mut path = Path::default();
    if rng.random_bool(0.5) {
        return path;
    }
    path.delay = interval.mul_f64(rng.random_range(0.0..4.0));
    if rng.random_bool(0.5) {
        let an_interval = rng.random_range(2..40) * BLOCK_BYTES;
        path.bytes_per_s = Some((an_interval as f64 / interval.as_secs_f64()) as u64);
        path.window_bytes = Some(rng.random_range(4..64) << 10);
    }
    if rng.random_bool(0.3) {
        path.bytes_per_connection = Some((volume_bytes as f64 * rng.random_range(1.2..3.0)) as u64 + OVERHEAD_BYTES);
    }
    path
}

impl Plan {
    pub(crate) fn of_seed(seed: u64, rng: &mut SmallRng) -> Self {
        let count = rng.random_range(1..=2);
        let sizes: Vec<u64> = (0..count).map(|_| rng.random_range(2..60) * BLOCK_BYTES + rng.random_range(0..2) * 700).collect();
        let durability = if seed.is_multiple_of(SEEDS_A_FLUSH_SYNC) { Durability::FlushSync } else { Durability::Async };
        let config = config(&sizes, durability, rng);
        let path = path(config.interval, sizes.iter().sum(), rng);
        // A connection that breaks by what it carries is to carry something.
        let is_noise = path.bytes_per_connection.is_some();
        let disks = sizes.iter().map(|bytes| content(*bytes, is_noise, rng)).collect();
        Self { config, disks, path, is_noise, faults: rng.random_bool(0.9), lives: has_life(seed) }
    }

    /// Nothing fails but the path: each connection on it carries `bytes_per_connection` and breaks. The disks are of 64 to 128 blocks, half
    /// of which are to be sent at first and cannot be compressed.
    pub(crate) fn flapping(bytes_per_connection: u64, rng: &mut SmallRng) -> Self {
        let sizes = [rng.random_range(64..128) * BLOCK_BYTES];
        let config = config(&sizes, Durability::Async, rng);
        let delay = config.interval.mul_f64(rng.random_range(0.0..1.0));
        let path = Path { delay, bytes_per_connection: Some(bytes_per_connection), ..Path::default() };
        let disks = sizes.iter().map(|bytes| content(*bytes, true, rng)).collect();
        Self { config, disks, path, is_noise: true, faults: false, lives: false }
    }
}
