//! A map from regions of a volume to values, allocated as touched: the table under dirty maps and the receiver's index.
//!
//! Two levels: a directory of pages of [`PAGE_REGIONS`] slots. A volume of 1 TiB (262,144 regions) costs 4 KiB while nothing
//! is in it. Pages and values are shared by `Arc`, so a snapshot copies the directory only and both copies go on
//! independently (copy on write).

use std::sync::Arc;

use crate::units::BLOCK_BYTES;

/// Blocks in a region.
pub const REGION_BLOCKS: u64 = 1024;
/// Bytes in a region: 4 MiB.
pub const REGION_BYTES: u64 = REGION_BLOCKS * BLOCK_BYTES;
/// Regions in a page of the directory: a page covers 2 GiB.
pub const PAGE_REGIONS: usize = 512;

type Page<S> = [Option<S>; PAGE_REGIONS];

/// A sparse map from region number to small values that are cheap to clone, such as an `Arc`.
#[derive(Debug)]
pub struct RegionSlots<S> {
    pages: Vec<Option<Arc<Page<S>>>>,
}

impl<S> Clone for RegionSlots<S> {
    /// A snapshot: O(volume / 2 GiB), content shared.
    fn clone(&self) -> Self {
        Self { pages: self.pages.clone() }
    }
}

impl<S> RegionSlots<S> {
    /// An empty map for a volume of `size_bytes`.
    #[must_use]
    pub fn new(size_bytes: u64) -> Self {
        let regions = size_bytes.div_ceil(REGION_BYTES);
        let pages = regions.div_ceil(PAGE_REGIONS as u64);
        let pages = usize::try_from(pages).unwrap_or(usize::MAX);
        Self { pages: vec![None; pages] }
    }

    /// The value of `region`, if it was ever touched.
    #[must_use]
    pub fn get(&self, region: u64) -> Option<&S> {
        let (page, slot) = split(region);
        self.pages.get(page)?.as_ref()?.get(slot)?.as_ref()
    }

    /// The touched regions from `first` on, in order.
    pub fn iter_from(&self, first: u64) -> impl Iterator<Item = (u64, &S)> {
        let (first_page, first_slot) = split(first);
        self.pages.iter().enumerate().skip(first_page).filter_map(|(p, page)| Some((p, page.as_ref()?))).flat_map(
            move |(p, page)| {
                let skip = if p == first_page { first_slot } else { 0 };
                page.iter()
                    .enumerate()
                    .skip(skip)
                    .filter_map(move |(s, value)| Some(((p * PAGE_REGIONS + s) as u64, value.as_ref()?)))
            },
        )
    }
}

impl<S: Clone> RegionSlots<S> {
    /// The slot of `region`, made if need be.
    ///
    /// # Panics
    /// If `region` lies beyond the volume: ranges are validated long before.
    pub fn slot(&mut self, region: u64) -> &mut Option<S> {
        let (page, slot) = split(region);
        assert!(page < self.pages.len(), "region {region} beyond the volume");
        let page = self.pages[page].get_or_insert_with(|| Arc::new(std::array::from_fn(|_| None)));
        &mut Arc::make_mut(page)[slot]
    }

    /// Forgets `region`. Returns its value.
    pub fn remove(&mut self, region: u64) -> Option<S> {
        self.get(region)?;
        self.slot(region).take()
    }

    /// The touched regions in order, by value; each page is given back as soon as it was gone through.
    pub fn into_values(self) -> impl Iterator<Item = (u64, S)> {
        self.pages.into_iter().enumerate().filter_map(|(p, page)| Some((p, page?))).flat_map(|(p, page)| {
            let number = move |s| (p * PAGE_REGIONS + s) as u64;
            Arc::unwrap_or_clone(page).into_iter().enumerate().filter_map(move |(s, value)| Some((number(s), value?)))
        })
    }
}

/// A sparse map from region number to `T`.
#[derive(Debug)]
pub struct RegionMap<T> {
    slots: RegionSlots<Arc<T>>,
}

impl<T> Clone for RegionMap<T> {
    /// A snapshot: O(volume / 2 GiB), content shared.
    fn clone(&self) -> Self {
        Self { slots: self.slots.clone() }
    }
}

impl<T> RegionMap<T> {
    /// An empty map for a volume of `size_bytes`.
    #[must_use]
    pub fn new(size_bytes: u64) -> Self {
        Self { slots: RegionSlots::new(size_bytes) }
    }

    /// The value of `region`, if it was ever touched.
    #[must_use]
    pub fn get(&self, region: u64) -> Option<&T> {
        self.slots.get(region).map(|value| &**value)
    }

    /// Forgets `region`. Returns whether it held a value.
    pub fn remove(&mut self, region: u64) -> bool {
        self.slots.remove(region).is_some()
    }

    /// The touched regions from `first` on, in order.
    pub fn iter_from(&self, first: u64) -> impl Iterator<Item = (u64, &T)> {
        self.slots.iter_from(first).map(|(region, value)| (region, &**value))
    }

    /// The touched regions in order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &T)> {
        self.iter_from(0)
    }
}

impl<T: Clone + Default> RegionMap<T> {
    /// The value of `region`, made if need be.
    ///
    /// # Panics
    /// If `region` lies beyond the volume: ranges are validated long before.
    pub fn get_or_default(&mut self, region: u64) -> &mut T {
        Arc::make_mut(self.slots.slot(region).get_or_insert_with(Arc::default))
    }
}

fn split(region: u64) -> (usize, usize) {
    let page = region / PAGE_REGIONS as u64;
    let slot = region % PAGE_REGIONS as u64;
    (usize::try_from(page).unwrap_or(usize::MAX), slot as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_does_not_see_later_changes() {
        let mut map = RegionMap::<u32>::new(1 << 40);
        *map.get_or_default(0) = 1;
        *map.get_or_default(262_143) = 2;
        let snapshot = map.clone();
        *map.get_or_default(0) = 3;
        *map.get_or_default(513) = 4;
        assert!(map.remove(262_143));
        assert!(!map.remove(262_143));
        assert_eq!(snapshot.iter().map(|(r, v)| (r, *v)).collect::<Vec<_>>(), [(0, 1), (262_143, 2)]);
        assert_eq!(map.iter().map(|(r, v)| (r, *v)).collect::<Vec<_>>(), [(0, 3), (513, 4)]);
        assert_eq!(map.iter_from(1).map(|(r, _)| r).collect::<Vec<_>>(), [513]);
        assert_eq!(map.get(5), None);
        assert_eq!(map.get(u64::MAX), None);
        // By value, while another still looks at the same pages.
        let values = |map: &RegionMap<u32>| map.slots.clone().into_values().map(|(r, v)| (r, *v)).collect::<Vec<_>>();
        assert_eq!((values(&map), values(&snapshot)), (vec![(0, 3), (513, 4)], vec![(0, 1), (262_143, 2)]));
    }
}
