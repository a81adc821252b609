//! The simulator finds nothing in what is right, and each rule that is broken on purpose within 200 seeds.

#![allow(clippy::unwrap_used, reason = "a test")]

use simulation::{Broken, break_rule, has_life, run, run_flapping};

/// Seeds that a test run goes through; `make simulate SEEDS=10000` goes through more.
const SEEDS: u64 = 200;
/// The largest disk of a flapping run, and what a connection carries besides.
const BYTES_OF_AN_EPOCH: u64 = (128 << 12) + (32 << 10);
/// Within so many seeds a broken rule must be found.
const FOUND_WITHIN: u64 = 200;

#[test]
fn no_violation() {
    let (mut points, mut crashes, mut flushes, mut scrubbed) = (0, 0, 0, 0);
    let (mut disk_faults, mut partitions, mut flips) = (0, 0, 0);
    let (mut handed, mut measured, mut switched, mut own) = (0, 0, 0, 0);
    for seed in 0..SEEDS {
        let outcome = run(seed).unwrap();
        points += outcome.points;
        crashes += outcome.crashes;
        flushes += outcome.flushes;
        scrubbed += outcome.scrubbed_bytes;
        disk_faults += outcome.disk_faults;
        partitions += outcome.partitions;
        flips += outcome.flips;
        handed += outcome.handed;
        measured += outcome.measured;
        switched += outcome.switched;
        own += outcome.own_blocks;
    }
    println!(
        "{SEEDS} seeds: {points} points, {crashes} crashes, {flushes} flushes that waited for the receiver, {scrubbed} bytes scrubbed"
    );
    assert!(scrubbed > SEEDS * 100 * 4096, "{scrubbed} bytes scrubbed: it tests nothing");
    println!("{disk_faults} faults of the primary's disks, {partitions} partitions, {flips} flipped bits");
    println!(
        "{handed} times disks given back or rolled back ({measured} measured), {switched} switchovers, {own} own blocks kept"
    );
    // One seed of four has a whole life.
    let lives = [handed > SEEDS as usize / 4, measured > 0, switched > SEEDS as usize / 20, own > SEEDS as usize];
    assert_eq!(
        lives, [true; 4],
        "{handed} given back, {measured} measured, {switched} switchovers, {own} own blocks: it tests nothing"
    );
    let new = [disk_faults, partitions, flips].map(|n| n > SEEDS as usize);
    assert_eq!(new, [true; 3], "{disk_faults} faults of disks, {partitions} partitions, {flips} flips: it tests nothing");
    assert!(flushes > SEEDS as usize, "{flushes} flushes: it tests nothing");
    assert!(points > 5 * SEEDS as usize && crashes > 3 * SEEDS as usize, "{points} points, {crashes} crashes: it tests nothing");
}

/// Would catch a session that cannot use what a connection carries: each carries the first epoch, which is half of the disk at most, with a
/// little besides, and then breaks.
#[test]
fn everything_arrives_over_connections_that_carry_an_epoch_and_break() {
    let (mut points, mut broken) = (0, 0);
    for seed in 0..20 {
        let outcome = run_flapping(seed, BYTES_OF_AN_EPOCH).unwrap();
        points += outcome.points;
        broken += outcome.broken;
    }
    println!("20 seeds: {points} points over connections that broke {broken} times");
    assert!(points > 20 && broken > 20, "{points} points, {broken} broken connections: it tests nothing");
}

/// More than a frame, less than the first epoch.
const BYTES_OF_A_SHORT_CONNECTION: u64 = 150 << 10;

/// Progress is certain whenever there is bandwidth. Would catch a broken pass that begins anew on each connection: none of these carries the
/// first epoch whole.
#[test]
fn points_are_committed_over_connections_that_carry_less_than_an_epoch() {
    let (mut points, mut broken) = (0, 0);
    for seed in 0..20 {
        let outcome = run_flapping(seed, BYTES_OF_A_SHORT_CONNECTION).unwrap();
        points += outcome.points;
        broken += outcome.broken;
    }
    println!("20 seeds: {points} points over connections that broke {broken} times");
    assert!(points > 20 && broken > 40, "{points} points, {broken} broken connections: it tests nothing");
}

fn found(rule: Broken) {
    found_in(rule, 0..FOUND_WITHIN);
}

/// Of 200 seeds those with the whole life of a server.
fn found_in_a_life(rule: Broken) {
    found_in(rule, (0..FOUND_WITHIN).filter(|seed| has_life(*seed)));
}

fn found_in(rule: Broken, seeds: impl Iterator<Item = u64>) {
    break_rule(Some(rule));
    let violation = { seeds }.find_map(|seed| run(seed).err());
    break_rule(None);
    let violation = violation.unwrap_or_else(|| panic!("{rule:?} was not noticed in {FOUND_WITHIN} seeds"));
    println!("{rule:?}: {violation}");
}

#[test]
fn acknowledging_before_the_sync_is_noticed() {
    found(Broken::AcknowledgeBeforeSync);
}

#[test]
fn forgetting_what_is_only_sent_is_noticed() {
    found(Broken::ClearOnSend);
}

#[test]
fn overtaking_a_capture_is_noticed() {
    found(Broken::SkipCopyBeforeWrite);
}

#[test]
fn writing_past_the_dirty_log_is_noticed() {
    found(Broken::SkipDirtyLog);
}

#[test]
fn answering_a_flush_early_is_noticed() {
    found(Broken::AnswerFlushEarly);
}

#[test]
fn letting_an_old_generation_in_is_noticed() {
    found(Broken::AcceptOldGeneration);
}

#[test]
fn letting_an_old_generation_in_after_a_promotion_is_noticed() {
    found_in_a_life(Broken::AcceptOldGeneration);
}

#[test]
fn overwriting_what_is_not_kept_is_noticed() {
    found_in_a_life(Broken::OverwriteBeforeKept);
}

#[test]
fn letting_guests_in_before_the_disks_are_handed_over_is_noticed() {
    found_in_a_life(Broken::OpenGateEarly);
}
