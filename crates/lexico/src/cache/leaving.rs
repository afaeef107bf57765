use super::LayerSettings;
use crate::Result;

/// The oldest positions of a recent window, a batch on its way to the codes; `C` is where its codes come from.
///
/// The caches of processors and of GPUs move positions by the same steps: a batch begins to leave when the window and a
/// batch more are full, and takes its place among the codes some steps later, so that there is time to code it in the
/// background. Until then it is attended to as dense, so that results do not depend on timing.
pub(crate) struct Leaving<C> {
    /// The steps since it began.
    pub(crate) age: usize,
    pub(crate) codes: C,
}

impl<C> Leaving<C> {
    /// Takes one step of decode, after which `held` positions are dense and some `older` are held too: `begin` has a batch
    /// coded where one is to leave. Returns the codes that are due.
    pub(crate) fn step(
        leaving: &mut Option<Self>,
        settings: &LayerSettings,
        older: usize,
        held: usize,
        begin: impl FnOnce() -> Result<C>,
    ) -> Result<Option<C>> {
        if leaving.is_none() && settings.begins(older, held) {
            *leaving = Some(Self {
                age: 0,
                codes: begin()?,
            });
        }
        match leaving {
            Some(waiting) if waiting.age < settings.wait() => {
                waiting.age += 1;
                Ok(None)
            }
            _ => Ok(leaving.take().map(|due| due.codes)),
        }
    }
}
