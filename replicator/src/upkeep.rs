//! Upkeep of the dirty log: forgets regions that have been clean for a while, and saves the exact maps at a clean stop.

use std::sync::Arc;
use std::time::Duration;

use blockdev::{BlockDevice, IoThreads};
use proto::Point;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::dirtylog::{DirtyLog, DirtyLogError};
use crate::gate::Gate;
use crate::ledger::Ledger;
use crate::record::{Record, RecordError, Stopped};
use crate::shared::Shared;

/// How often; a region must have been written neither between the last two times nor since, so its bit goes after one to two of these. The disks
/// are flushed each time that there is something to forget, so not too often; by then the kernel has written most of it.
const EVERY: Duration = Duration::from_secs(60);
/// Regions looked at while admission is held up: some 10 microseconds.
const REGIONS_AT_ONCE: usize = 256;

#[derive(Debug, thiserror::Error)]
pub(crate) enum UpkeepError {
    #[error(transparent)]
    Log(#[from] DirtyLogError),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("disk {volume}: cannot be flushed: {source}")]
    Flush { volume: usize, source: std::io::Error },
}

/// See the module.
pub(crate) struct Upkeep {
    shared: Arc<Shared>,
    record: Arc<Record>,
    devices: Arc<[Arc<dyn BlockDevice>]>,
    next: Instant,
    running: Option<oneshot::Receiver<()>>,
}

impl Upkeep {
    pub(crate) fn new(shared: Arc<Shared>, record: Arc<Record>, devices: Arc<[Arc<dyn BlockDevice>]>) -> Self {
        Self { shared, record, devices, next: Instant::now() + EVERY, running: None }
    }

    /// Resolves when it is time, and the last time is over.
    pub(crate) async fn due(&mut self) {
        tokio::time::sleep_until(self.next).await;
        if let Some(running) = &mut self.running {
            // An error means that the thread is gone.
            let _ = running.await;
            self.running = None;
        }
    }

    /// Starts a round on the capture thread.
    pub(crate) fn begin(&mut self, thread: &IoThreads) {
        self.next = Instant::now() + EVERY;
        let (done, running) = oneshot::channel();
        let (shared, record, devices) = (self.shared.clone(), self.record.clone(), self.devices.clone());
        thread.spawn(move || async move {
            let cleared = |point| record.update(|r| r.cleared = r.cleared.max(point));
            if let Err(error) = forget_clean(&shared.log, &shared.ledger, &devices, cleared).await {
                tracing::warn!(group = %shared.group, "{error}; regions stay marked");
            }
            let _ = done.send(());
        });
        self.running = Some(running);
    }

    /// Saves the exact maps, if the session came to a clean end. The exports have stopped before.
    pub(crate) async fn finish(&mut self, thread: &IoThreads) {
        if let Some(running) = self.running.take() {
            let _ = running.await;
        }
        let (shared, record, devices) = (self.shared.clone(), self.record.clone(), self.devices.clone());
        let saved = thread.call(move || async move {
            let cleared = |point| record.update(|r| r.cleared = r.cleared.max(point));
            // A handback goes on until the process ends, and what it brings is in the maps only once it is on its way.
            let hands_over = || matches!(record.get().stopped, Some(Stopped::Handback { .. }));
            save(&shared.log, &shared.ledger, (&devices, &shared.gate), cleared, hands_over).await
        });
        match saved.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(group = %self.shared.group, "{error}; what was written lately is compared at the next start")
            }
            Err(error) => tracing::warn!(group = %self.shared.group, %error, "the maps are not saved"),
        }
    }
}

/// Forgets regions that are clean and idle, once nothing can make them differ again: the disks hold durably what the copy has (a power loss
/// would otherwise put older content back), and what made the regions clean is recorded (`cleared`).
pub(crate) async fn forget_clean(
    log: &DirtyLog,
    ledger: &Ledger,
    devices: &[Arc<dyn BlockDevice>],
    cleared: impl FnOnce(Option<Point>) -> Result<(), RecordError>,
) -> Result<(), UpkeepError> {
    // What is forgotten in memory alone would be asked of the log again, which grants nothing any more.
    if log.failure().is_some() {
        return Ok(());
    }
    let (mut unset, mut point) = (Vec::new(), None);
    for volume in 0..log.volume_count() {
        let mut of_volume = Vec::new();
        for regions in log.idle(volume).chunks(REGIONS_AT_ONCE) {
            let committed = ledger.clean_regions(volume, regions, |region| {
                log.unset(volume, region);
                of_volume.push(region);
            });
            point = point.max(committed);
            tokio::task::yield_now().await;
        }
        unset.push(of_volume);
    }
    if unset.iter().all(Vec::is_empty) {
        return Ok(());
    }
    let kept = async {
        for (volume, device) in devices.iter().enumerate().filter(|(volume, _)| !unset[*volume].is_empty()) {
            device.flush().await.map_err(|source| UpkeepError::Flush { volume, source })?;
        }
        // A small file is synced here; the capture waits for it, the guest does not.
        Ok(cleared(point)?)
    };
    // They stay marked, in memory as in the files.
    kept.await.inspect_err(|_: &UpkeepError| log.set_again(&unset))?;
    log.write_unset(&unset).await?;
    Ok(())
}

/// What a clean stop leaves: marks of dirty regions only, and the exact maps. `hands_over`, asked once the gate is closed: the disks are being given back.
pub(crate) async fn save(
    log: &DirtyLog,
    ledger: &Ledger,
    (devices, gate): (&[Arc<dyn BlockDevice>], &Gate),
    cleared: impl Fn(Option<Point>) -> Result<(), RecordError>,
    hands_over: impl Fn() -> bool,
) -> Result<(), UpkeepError> {
    // Twice: the first time tells which regions were written since the last.
    for _ in 0..2 {
        forget_clean(log, ledger, devices, &cleared).await?;
    }
    // A client whose disk hung outlives the end of its server. What was admitted before the gate was closed keeps the maps from being settled.
    gate.stop();
    if hands_over() {
        return Ok(());
    }
    let Some(maps) = ledger.settled() else { return Ok(()) };
    // They are of this commit: with a receiver that is older they say too little.
    cleared(ledger.summary().committed)?;
    // The maps say what differs from the disks as they are now; so these must not lose anything any more.
    for (volume, device) in devices.iter().enumerate() {
        device.flush().await.map_err(|source| UpkeepError::Flush { volume, source })?;
    }
    Ok(log.save(&maps).await?)
}
