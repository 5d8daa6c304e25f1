//! Puts a member's pack among the others, and says where each guest frame is.

use std::fs::File;
use std::path::Path;

use super::bits::Bits;
use super::error::Error;
use super::files::{self, Lock};
use super::known::{Known, Location};
use super::map::{PageMap, Where, PACKS_MAX};
use super::pack::PackId;
use super::packer::Packed;
use super::packs::{try_lock_pack, Packs};
use super::rewrite;
use super::store::SQUEEZED_NAME;
use super::table::{Content, PageTable};
use super::Result;

/// A pack of which more than an eighth is of no use is rewritten: what changed
/// while it was taken, or what another member has stored meanwhile.
const UNUSED_SHARE_MAX: usize = 8;

/// What [`publish`] has made. Keeps all packs that the map names from being removed
/// for as long as it lives.
pub(crate) struct Published {
    /// Where each frame is.
    pub map: PageMap,
    /// Pages and bytes of the member's own pack.
    pub own: (u64, u64),
    _known: Known,
    _own_pack: Option<File>,
}

/// Publishes the pack in the member's directory `dir`; `table` says which frame is
/// which page.
///
/// # Errors
///
/// [`Error::Io`], [`Error::Damaged`], [`Error::Unstorable`].
pub(crate) fn publish(
    mut packed: Packed,
    table: &PageTable,
    packs: &Packs,
    dir: &Path,
) -> Result<Published> {
    let _publishing = packs.lock_publishing()?;
    use_what_others_stored(&mut packed)?;
    let mut used = Bits::none(packed.table.hashes.len());
    for (_, _, content) in table.iter() {
        if let Some(Location { pack: 0, page }) = location(&packed, content) {
            used.set(page as usize);
        }
    }
    let (pages, count) = (packed.table.hashes.len(), used.count());
    if count > 0 && pages - count > pages / UNUSED_SHARE_MAX {
        packed = squeeze(packed, &used, dir)?;
    }
    let own = if count == 0 {
        std::fs::remove_file(&packed.path).map_err(Error::io("remove", &packed.path))?;
        None
    } else {
        packed.close()?;
        Some((packed.table.id(), packed.table.pages()))
    };
    let map = map(&packed, table, own)?;
    let mut bytes = 0;
    if let Some((id, _)) = own {
        // Locked before anybody else can find it.
        if !try_lock_pack(&packed.file, &packed.path, Lock::Shared)? {
            let path = packed.path;
            return Err(Error::InUse { path });
        }
        let facts = packed.file.metadata();
        bytes = facts.map_err(Error::io("look at", &packed.path))?.len();
        packs.publish(&packed.path, &id)?;
    }
    Ok(Published {
        map,
        own: (own.map_or(0, |own| u64::from(own.1)), bytes),
        _known: packed.known,
        _own_pack: own.map(|_| packed.file),
    })
}

/// Members of one take don't see each other's pages until one is published: those
/// that came in time replace ours.
fn use_what_others_stored(packed: &mut Packed) -> Result<()> {
    let before = packed.known.packs().len();
    packed.known.learn()?;
    if packed.known.packs().len() == before {
        return Ok(());
    }
    let hashes = packed.table.hashes.iter();
    let found: Vec<_> = hashes.map(|hash| packed.known.find(hash)).collect();
    for location in &mut packed.locations {
        if location.pack == 0 {
            let theirs = found.get(location.page as usize).copied().flatten();
            *location = theirs.unwrap_or(*location);
        }
    }
    Ok(())
}

fn squeeze(packed: Packed, used: &Bits, dir: &Path) -> Result<Packed> {
    let (old, new) = (packed.path.clone(), dir.join(SQUEEZED_NAME));
    let squeezed = rewrite::squeeze(packed, used, files::create_file(&new)?, &new)?;
    std::fs::remove_file(&old).map_err(Error::io("remove", &old))?;
    Ok(squeezed)
}

fn location(packed: &Packed, content: Content) -> Option<Location> {
    match content {
        Content::Packed(number) => packed.locations.get(number as usize).copied(),
        Content::Nothing | Content::Zero | Content::Slot(_) | Content::Held(_) => None,
    }
}

/// The packs in the order in which they are first used.
struct Used {
    /// Its place in the map, by its place among those known.
    places: Vec<Option<u16>>,
    packs: Vec<(PackId, u32)>,
}

impl Used {
    fn place(&mut self, pack: u32, own: Option<(PackId, u32)>, known: &Known) -> Option<u16> {
        let slot = self.places.get_mut(pack as usize)?;
        if slot.is_none() {
            let named = match pack.checked_sub(1) {
                None => own?,
                Some(nth) => {
                    let pack = known.packs().get(nth as usize)?;
                    (pack.id, pack.pages)
                }
            };
            *slot = u16::try_from(self.packs.len()).ok();
            self.packs.push(named);
        }
        slot.filter(|_| self.packs.len() <= PACKS_MAX)
    }
}

fn map(packed: &Packed, table: &PageTable, own: Option<(PackId, u32)>) -> Result<PageMap> {
    let mut used = Used {
        places: vec![None; packed.known.packs().len() + 1],
        packs: Vec::new(),
    };
    let mut map = PageMap::default();
    for (pfn, page_type, content) in table.iter() {
        let content = match content {
            Content::Nothing => Where::Nothing,
            Content::Zero => Where::Zero,
            Content::Packed(_) | Content::Slot(_) | Content::Held(_) => {
                let found = location(packed, content).and_then(|found| {
                    let pack = used.place(found.pack, own, &packed.known)?;
                    let page = found.page;
                    Some(Where::Pack { pack, page })
                });
                found.ok_or_else(|| {
                    let problem = format!("pfn {pfn:#x} was lost on its way to the pack");
                    Error::unstorable("a member", problem)
                })?
            }
        };
        map.push(pfn, page_type, content);
    }
    map.packs = used.packs;
    Ok(map)
}
