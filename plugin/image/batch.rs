//! What a copy says of a member's frames: which they are, and the hashes of those
//! with contents. Layout in `plugin/docs/protocol.md`, "A copy".

use super::map::{Run, Where};
use super::pack::Hash;
use super::table::PFN_COUNT_MAX;
use crate::stream::PageType;

/// Hashes in a batch, at most: 16 MiB of pages.
pub(crate) const BATCH_HASHES_MAX: usize = 4096;
/// Runs in a batch, at most.
pub(crate) const BATCH_RUNS_MAX: usize = 4096;
/// Bytes of a batch, at most.
pub(crate) const BATCH_BYTES_MAX: usize =
    BATCH_HASHES_MAX * HASH_BYTES + BATCH_RUNS_MAX * RUN_BYTES;

const RUN_BYTES: usize = 16;
const HASH_BYTES: usize = 32;

/// Consecutive frames of the same type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BatchRun {
    pub pfn: u32,
    pub count: u32,
    pub page_type: PageType,
    pub content: BatchContent,
}

/// What they contain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum BatchContent {
    Nothing,
    Zero,
    /// Pages with these hashes, one a frame.
    Pages(Vec<Hash>),
}

impl BatchRun {
    /// A run of an index; the hashes of its pages are needed only if it has any.
    pub(crate) fn of(run: &Run, hashes: Vec<Hash>) -> Self {
        BatchRun {
            pfn: run.pfn,
            count: run.count,
            page_type: run.page_type,
            content: match run.content {
                Where::Nothing => BatchContent::Nothing,
                Where::Zero => BatchContent::Zero,
                Where::Pack { .. } => BatchContent::Pages(hashes),
            },
        }
    }
}

/// The bytes of a batch.
pub(crate) fn encode(runs: &[BatchRun]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for run in runs {
        let (kind, hashes) = match &run.content {
            BatchContent::Nothing => (0, &[][..]),
            BatchContent::Zero => (1, &[][..]),
            BatchContent::Pages(hashes) => (2, hashes.as_slice()),
        };
        bytes.extend_from_slice(&run.pfn.to_le_bytes());
        bytes.extend_from_slice(&run.count.to_le_bytes());
        bytes.extend_from_slice(&[run.page_type.bits(), kind, 0, 0, 0, 0, 0, 0]);
        bytes.extend(hashes.iter().flatten());
    }
    bytes
}

/// Reads and checks the bytes of a batch; `Err` says what is wrong. Frames go
/// upwards without overlap, from `first_pfn` on.
pub(crate) fn decode(mut rest: &[u8], first_pfn: u64) -> Result<Vec<BatchRun>, String> {
    if rest.len() > BATCH_BYTES_MAX {
        return Err(format!("it is longer than {BATCH_BYTES_MAX} bytes"));
    }
    let mut runs = Vec::new();
    let mut next_pfn = first_pfn;
    while let Some((run, after)) = rest.split_first_chunk::<RUN_BYTES>() {
        rest = after;
        let [p0, p1, p2, p3, c0, c1, c2, c3, page_type, kind, zeroes @ ..] = *run;
        let pfn = u32::from_le_bytes([p0, p1, p2, p3]);
        let count = u32::from_le_bytes([c0, c1, c2, c3]);
        let end = u64::from(pfn) + u64::from(count);
        if u64::from(pfn) < next_pfn || count == 0 || end > PFN_COUNT_MAX || zeroes != [0; 6] {
            return Err(format!("its run at pfn {pfn:#x} is impossible"));
        }
        next_pfn = end;
        let page_type = PageType::from_bits(page_type)
            .ok_or_else(|| format!("its run at pfn {pfn:#x} has no page type"))?;
        let content = match (kind, page_type.has_data()) {
            (0, false) => BatchContent::Nothing,
            (1, true) => BatchContent::Zero,
            (2, true) => {
                let bytes = usize::try_from(count).ok().and_then(|count| {
                    let count = (count <= BATCH_HASHES_MAX).then_some(count)?;
                    rest.split_at_checked(count * HASH_BYTES)
                });
                let (hashes, after) =
                    bytes.ok_or_else(|| format!("its run at pfn {pfn:#x} is cut short"))?;
                rest = after;
                let hashes = hashes.chunks_exact(HASH_BYTES);
                BatchContent::Pages(hashes.filter_map(|h| h.first_chunk().copied()).collect())
            }
            _ => return Err(format!("its run at pfn {pfn:#x} contradicts itself")),
        };
        runs.push(BatchRun {
            pfn,
            count,
            page_type,
            content,
        });
    }
    if rest.is_empty() {
        Ok(runs)
    } else {
        Err("it is cut short".to_owned())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn sample() -> Vec<BatchRun> {
        let run = |pfn, count, page_type, content| BatchRun {
            pfn,
            count,
            page_type,
            content,
        };
        vec![
            run(
                3,
                2,
                PageType::Normal,
                BatchContent::Pages(vec![[7; 32], [8; 32]]),
            ),
            run(5, 9, PageType::L1, BatchContent::Zero),
            run(100, 1, PageType::Invalid, BatchContent::Nothing),
        ]
    }

    #[test]
    fn what_is_encoded_comes_back() {
        let bytes = encode(&sample());
        assert_eq!(bytes.len(), 3 * 16 + 64);
        assert_eq!(decode(&bytes, 0), Ok(sample()));
        assert_eq!(decode(&bytes, 3), Ok(sample()));
        assert!(decode(&bytes, 4).is_err());
        assert_eq!(decode(&[], 0), Ok(Vec::new()));
    }

    #[test]
    fn no_mutilated_batch_is_a_panic_or_goes_downwards() {
        let good = encode(&sample());
        for at in 0..good.len() {
            assert!(at % 16 == 0 || decode(&good[..at], 0).is_err() || at == 80);
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut bad = good.clone();
                bad[at] = value;
                let Ok(runs) = decode(&bad, 0) else { continue };
                let order = runs
                    .windows(2)
                    .all(|pair| pair[0].pfn + pair[0].count <= pair[1].pfn);
                assert!(order, "byte {at}");
            }
        }
        assert!(decode(&vec![0; BATCH_BYTES_MAX + 1], 0).is_err());
    }
}
