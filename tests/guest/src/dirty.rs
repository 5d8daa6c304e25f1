//! Memory that's written at a chosen rate, and verified: a page that a
//! snapshot lost, mixed up or brought back old can't go unnoticed, since what
//! each page must hold is also written down elsewhere.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::clock::Pace;
use crate::json::Json;
use crate::status::{self, lock, Status};

const PAGE_WORDS: usize = 512;
const TICKS_PER_S: u32 = 100;
/// A guest that didn't get its processor writes more later, up to so much.
const CATCH_UP: Duration = Duration::from_millis(300);
/// Mismatches that are printed; all are counted.
const PRINTED_MAX: u64 = 20;

/// What the dirtying has come to.
#[derive(Default)]
pub struct Count {
    /// Pages written.
    pub written: u64,
    /// Pages that weren't as they had been left.
    pub corrupt: u64,
}

/// One of the machine's pages: a write to an unaligned one would dirty two.
#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u64; PAGE_WORDS]);

/// Starts the dirtying in a thread of its own.
pub fn start(status: &Status, pages_per_s: u32, working_set_mib: u32) -> Arc<Mutex<Count>> {
    let count = status::shared(status, "memory", Count::default(), move |count: &Count| {
        let mut json = Json::new();
        json.number("dirty_pages_per_s", pages_per_s)
            .number("working_set_mib", working_set_mib)
            .number("written", count.written)
            .number("corrupt", count.corrupt);
        json
    });
    let shared = count.clone();
    if pages_per_s > 0 {
        std::thread::spawn(move || run(pages_per_s, working_set_mib, &shared));
    }
    count
}

fn run(pages_per_s: u32, working_set_mib: u32, count: &Mutex<Count>) {
    let number = (working_set_mib as usize).max(1) * 256;
    // Written through at once, so that the whole set exists from the start.
    let mut pages: Vec<Page> = vec![Page([1; PAGE_WORDS]); number];
    let mut generations = vec![0u32; number];
    for (index, page) in pages.iter_mut().enumerate() {
        write(page, index, 0);
    }
    let stride = stride(number);
    let mut index = 0;
    let mut owed = 0u32;
    let mut pace = Pace::catching_up(Duration::from_secs(1) / TICKS_PER_S, CATCH_UP);
    loop {
        pace.wait();
        owed += pages_per_s;
        let batch = owed / TICKS_PER_S;
        owed %= TICKS_PER_S;
        for _ in 0..batch {
            if let (Some(page), Some(generation)) =
                (pages.get_mut(index), generations.get_mut(index))
            {
                verify(page, index, *generation, count);
                *generation = generation.wrapping_add(1);
                write(page, index, *generation);
            }
            index = (index + stride) % number;
        }
        lock(count).written += u64::from(batch);
    }
}

/// A step that comes by every page before it comes by one twice.
fn stride(number: usize) -> usize {
    let gcd = |mut a: usize, mut b: usize| {
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    (number * 5 / 13 + 1..)
        .find(|step| gcd(*step, number) == 1)
        .unwrap_or(1)
}

/// Fills a page with what follows from its index and generation: the two of
/// them, filling, and a checksum at the end.
fn write(page: &mut Page, index: usize, generation: u32) {
    let mut value = ((index as u64) << 32 | u64::from(generation)) ^ 0x5851_f42d_4c95_7f2d;
    let mut sum = 0u64;
    for (at, word) in page.0.iter_mut().enumerate() {
        *word = match at {
            0 => index as u64,
            1 => u64::from(generation),
            _ if at == PAGE_WORDS - 1 => sum,
            _ => {
                value = value
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                value
            }
        };
        sum = sum.rotate_left(1) ^ *word;
    }
}

fn verify(page: &Page, index: usize, generation: u32, count: &Mutex<Count>) {
    let Page(page) = page;
    let sum = page
        .iter()
        .take(PAGE_WORDS - 1)
        .fold(0u64, |sum, word| sum.rotate_left(1) ^ word);
    let good =
        page[0] == index as u64 && page[1] == u64::from(generation) && page[PAGE_WORDS - 1] == sum;
    if good {
        return;
    }
    let corrupt = {
        let mut count = lock(count);
        count.corrupt += 1;
        count.corrupt
    };
    if corrupt <= PRINTED_MAX {
        println!(
            "MEMORY-CORRUPT page {index} generation {generation}: holds page {} \
             generation {}, checksum {}",
            page[0],
            page[1],
            if page[PAGE_WORDS - 1] == sum {
                "good"
            } else {
                "bad"
            }
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn corrupt(change: impl FnOnce(&mut Page)) -> u64 {
        let mut page = Page([0; PAGE_WORDS]);
        write(&mut page, 3, 9);
        change(&mut page);
        let count = Mutex::new(Count::default());
        verify(&page, 3, 9, &count);
        let corrupt = lock(&count).corrupt;
        corrupt
    }

    #[test]
    fn a_flipped_bit_an_old_page_and_another_page_show() {
        assert_eq!(corrupt(|_| {}), 0);
        assert_eq!(corrupt(|page| page.0[300] ^= 4), 1);
        assert_eq!(corrupt(|page| write(page, 3, 8)), 1);
        assert_eq!(corrupt(|page| write(page, 4, 9)), 1);
    }

    #[test]
    fn a_page_is_one_of_the_machines() {
        assert_eq!(size_of::<Page>(), 4096);
        assert_eq!(align_of::<Page>(), 4096);
    }

    #[test]
    fn every_page_is_visited_in_each_cycle() {
        for number in [256, 16_384, 768] {
            let step = stride(number);
            let mut seen = vec![false; number];
            let mut index = 0;
            for _ in 0..number {
                assert!(!seen[index]);
                seen[index] = true;
                index = (index + step) % number;
            }
        }
    }
}
