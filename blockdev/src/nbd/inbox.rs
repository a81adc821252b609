//! Bytes received and not yet parsed. One large receive brings many requests; small payloads are used where they lie.

/// Size of the receive buffer: a queue of 32 writes of 4 KiB with room to spare.
const INBOX_BYTES: usize = 256 << 10;
/// Receive again only with at least this much room, so that calls stay large; it exceeds any message kept here.
const ROOM_MIN: usize = 96 << 10;

#[derive(Debug)]
pub(super) struct Inbox {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Inbox {
    pub(super) fn new() -> Self {
        Self { bytes: vec![0; INBOX_BYTES].into_boxed_slice(), start: 0, end: 0 }
    }

    pub(super) fn unread(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    pub(super) fn consume(&mut self, n: usize) {
        self.start += n;
        debug_assert!(self.start <= self.end, "consumed more than there was");
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
    }

    /// Where the next bytes go; empty when the inbox is full.
    pub(super) fn room(&mut self) -> &mut [u8] {
        if self.start > 0 && self.bytes.len() - self.end < ROOM_MIN {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        &mut self.bytes[self.end..]
    }

    pub(super) fn received(&mut self, n: usize) {
        self.end += n;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_out_as_they_went_in_across_compaction() {
        let mut inbox = Inbox::new();
        let (mut sent, mut seen) = (0_u32, 0_u32);
        for _ in 0..2_000 {
            let room = inbox.room();
            let n = room.len().min(3_000) / 4 * 4;
            for word in room[..n].chunks_exact_mut(4) {
                word.copy_from_slice(&sent.to_be_bytes());
                sent += 1;
            }
            inbox.received(n);
            while inbox.unread().len() > 1_000 {
                let word = *inbox.unread().first_chunk::<4>().unwrap();
                assert_eq!(u32::from_be_bytes(word), seen);
                seen += 1;
                inbox.consume(4);
            }
        }
        assert!(seen > 1_000_000);
    }
}
