//! The metadata contexts that there are, and sets of them.

use crate::proto::{
    META_CONTEXT_BASE_ALLOCATION, META_CONTEXT_MEMDEV_DIRTY, META_NAME_BASE_ALLOCATION,
    META_NAME_MEMDEV_DIRTY, MetaContext,
};

/// A metadata context that can be selected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KnownContext {
    /// `base:allocation`: where there is data, and what reads as zeroes.
    BaseAllocation,
    /// `memdev:dirty`: what the session wrote.
    Dirty,
}

impl KnownContext {
    /// All of them, in the order in which they are listed and reported.
    pub const ALL: [Self; 2] = [Self::BaseAllocation, Self::Dirty];

    /// Its name and its number on the wire.
    #[must_use]
    pub const fn on_the_wire(self) -> MetaContext<'static> {
        match self {
            Self::BaseAllocation => {
                MetaContext { id: META_CONTEXT_BASE_ALLOCATION, name: META_NAME_BASE_ALLOCATION }
            }
            Self::Dirty => MetaContext { id: META_CONTEXT_MEMDEV_DIRTY, name: META_NAME_MEMDEV_DIRTY },
        }
    }

    /// The context with this number.
    #[must_use]
    pub fn from_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|context| context.on_the_wire().id == id)
    }

    /// Whether a list query finds it: by its name, or by its namespace alone.
    pub(super) fn is_listed_by(self, query: &str) -> bool {
        let name = self.on_the_wire().name;
        query == name
            || query.strip_suffix(':').is_some_and(|namespace| name.split(':').next() == Some(namespace))
    }

    const fn bit(self) -> u8 {
        1 << self as u8
    }
}

/// Some of the metadata contexts.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct ContextSet(u8);

impl std::fmt::Debug for ContextSet {
    /// Those that are in it.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

impl ContextSet {
    /// Adds one.
    ///
    /// # Errors
    /// It is in the set already.
    pub fn insert(&mut self, context: KnownContext) -> Result<(), KnownContext> {
        if self.contains(context) {
            return Err(context);
        }
        self.0 |= context.bit();
        Ok(())
    }

    /// Whether it is one of them.
    #[must_use]
    pub const fn contains(self, context: KnownContext) -> bool {
        self.0 & context.bit() != 0
    }

    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// How many there are.
    #[must_use]
    pub const fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// Those that are in the set, in the order of [`KnownContext::ALL`].
    pub fn iter(self) -> impl Iterator<Item = KnownContext> {
        KnownContext::ALL.into_iter().filter(move |&context| self.contains(context))
    }
}

impl FromIterator<KnownContext> for ContextSet {
    fn from_iter<I: IntoIterator<Item = KnownContext>>(contexts: I) -> Self {
        Self(contexts.into_iter().fold(0, |set, context| set | context.bit()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_are_known_by_their_numbers_which_differ() {
        for context in KnownContext::ALL {
            assert_eq!(KnownContext::from_id(context.on_the_wire().id), Some(context));
        }
        assert_eq!((KnownContext::from_id(0), KnownContext::from_id(99)), (None, None));
    }

    #[test]
    fn a_set_has_each_once() {
        let mut set = ContextSet::default();
        assert!(set.is_empty());
        assert_eq!(set.insert(KnownContext::Dirty), Ok(()));
        assert_eq!(set.insert(KnownContext::Dirty), Err(KnownContext::Dirty));
        assert!(set.contains(KnownContext::Dirty) && !set.contains(KnownContext::BaseAllocation));
        assert_eq!(set.insert(KnownContext::BaseAllocation), Ok(()));
        assert!(set.iter().eq(KnownContext::ALL));
        assert_eq!((set.len(), KnownContext::ALL.into_iter().collect::<ContextSet>()), (2, set));
    }
}
