//! The simulator finds nothing in what is right, and each rule that is broken on purpose within 200 seeds.

#![allow(clippy::unwrap_used, reason = "a test")]

use simulation::{Broken, break_rule, run};

/// Seeds that a test run goes through; `make simulate SEEDS=10000` goes through more.
const SEEDS: u64 = 100;
/// Within so many seeds a broken rule must be found.
const FOUND_WITHIN: u64 = 200;

#[test]
fn no_violation() {
    let (mut points, mut crashes, mut flushes, mut scrubbed) = (0, 0, 0, 0);
    for seed in 0..SEEDS {
        let outcome = run(seed).unwrap();
        points += outcome.points;
        crashes += outcome.crashes;
        flushes += outcome.flushes;
        scrubbed += outcome.scrubbed_bytes;
    }
    println!(
        "{SEEDS} seeds: {points} points, {crashes} crashes, {flushes} flushes that waited for the receiver, {scrubbed} bytes scrubbed"
    );
    assert!(scrubbed > SEEDS * 100 * 4096, "{scrubbed} bytes scrubbed: it tests nothing");
    assert!(flushes > SEEDS as usize, "{flushes} flushes: it tests nothing");
    assert!(points > 5 * SEEDS as usize && crashes > 3 * SEEDS as usize, "{points} points, {crashes} crashes: it tests nothing");
}

fn found(rule: Broken) {
    break_rule(Some(rule));
    let violation = (0..FOUND_WITHIN).find_map(|seed| run(seed).err());
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
